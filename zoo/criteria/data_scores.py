"""Scores from labelled images: one per channel of each group; the highest stay.

Every criterion evaluates the network in eval mode and leaves it unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from zoo.common.strides import UnitStrides
from zoo.criteria.weight_scores import (
    Scores,
    per_unit,
    sum_over_filters,
    sum_over_slots,
)
from zoo.data.batches import check_labels
from zoo.errors import GraphError, ZooError
from zoo.spec.groups import ChannelGroups, Slot
from zoo.surgery.surgery import evaluating

__all__ = [
    "Batches",
    "apoz_scores",
    "fisher_scores",
    "obd_scores",
    "snip_scores",
    "taylor_features",
    "taylor_scores",
    "taylor_weight_scores",
]

Batches = Iterable[tuple[Tensor, Tensor]]


# --- activations and their gradients --------------------------------------------------------------


def taylor_features(module: nn.Module, groups: ChannelGroups, batches: Batches) -> list[Tensor]:
    """E|∂ε/∂L · L| per channel, ε the mean cross-entropy (paper, eq. 9; Molchanov et al., 2016).

    The mean is over images and positions, of absolute values; L is the output of the layer that
    produces the group. Several such layers, and several calls of one, are summed.

    Args:
        module: the network, evaluated in eval mode; neither its weights nor its mode change.
        groups: its channel groups.
        batches: (images (N, C, H, W), labels (N,)) on the module's device.

    Returns:
        One tensor (group size,) per group.

    Raises:
        DataError: when a label does not fit the network's outputs.
        GraphError: when anything but a layer that is called produces channels, or no gradient
            reaches one.
        ZooError: when there are no batches.
    """
    return _output_scores(
        module, groups, batches, lambda product: product.abs().mean(2), lambda unit: unit
    )


def taylor_scores(module: nn.Module, groups: ChannelGroups, batches: Batches) -> Scores:
    """`taylor_features` as scores."""
    return [row.tolist() for row in taylor_features(module, groups, batches)]


def fisher_scores(module: nn.Module, groups: ChannelGroups, batches: Batches) -> Scores:
    """E ½(Σ ∂ε/∂L · L)², the sum over positions (Theis et al., 2018, section 2).

    It is half the empirical Fisher information of a gate on the channel. Sums of several layers
    that produce the channel, or of several calls of one, are added before the square.
    """
    features = _output_scores(
        module, groups, batches, lambda product: product.sum(2), lambda unit: unit.square() / 2
    )
    return [row.tolist() for row in features]


def _output_scores(
    module: nn.Module,
    groups: ChannelGroups,
    batches: Batches,
    over_positions: Callable[[Tensor], Tensor],
    of_unit: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Per unit, the mean over images of a score of gradient · output of its layers.

    Args:
        over_positions: products of one call (N, channels, positions) -> (N, channels).
        of_unit: their sums over all layers and calls (N, units) -> (N, units).
    """
    layers = _producers(module, groups)
    sums = [torch.zeros(group.size, dtype=torch.float64) for group in groups.groups]
    count = 0
    with _differentiable(module), _outputs(layers) as outputs:
        products = partial(_products, module, layers, outputs, over_positions)
        for images, labels in batches:
            rows = products(images, labels)
            if rows is None:
                singles = [
                    products(image[None], label[None])
                    for image, label in zip(images, labels, strict=True)
                ]
                rows = {name: torch.cat([row[name] for row in singles if row]) for name in layers}
            for group, total in zip(groups.groups, sums, strict=True):
                units = torch.zeros(len(labels), group.size, device=images.device)
                for slot in group.filter_slots:
                    units = units + per_unit(rows[_layer_name(slot)], slot, group.size)
                total += of_unit(units).sum(0).cpu()
            count += len(labels)
    return [total / _at_least_one(count) for total in sums]


def _products(
    module: nn.Module,
    layers: dict[str, nn.Module],
    outputs: dict[str, list[Tensor]],
    over_positions: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
) -> dict[str, Tensor] | None:
    """Layer name -> `over_positions` of its gradients · outputs (N, channels), summed over calls.

    None where the first dimension of a layer is not that of several images: a network may fold
    parts of them into it, and only an image by itself tells which are its own.
    """
    for kept in outputs.values():
        kept.clear()
    # gradients reach the layers of a frozen network through its input
    loss = _loss(module, images.detach().requires_grad_(), labels)
    calls = [(name, output) for name, kept in outputs.items() for output in kept]
    if silent := sorted(layers.keys() - {name for name, _ in calls}):
        raise GraphError(
            f"This criterion needs the outputs of layers; the layer {silent[0]!r} is not "
            f"called: forward uses its weight in another way."
        )
    for name, output in calls:
        if not output.requires_grad:
            raise GraphError(
                f"This criterion needs gradients, and forward computes the layer {name!r} without."
            )
        if len(labels) > 1 and len(output) != len(labels):
            return None
    gradients = torch.autograd.grad(loss, [output for _, output in calls], materialize_grads=True)
    rows: dict[str, Tensor] = {}
    for (name, output), gradient in zip(calls, gradients, strict=True):
        # the loss is a mean over the batch; ε is per image
        product = _channels_second(layers[name], (gradient * output).detach() * len(labels))
        parts = product.unflatten(0, (len(labels), -1)).transpose(1, 2)
        rows[name] = rows.get(name, 0) + over_positions(parts.flatten(2))
    return rows


def _producers(module: nn.Module, groups: ChannelGroups) -> dict[str, nn.Module]:
    """Name -> layer, for all layers whose weights are filters."""
    wanted = {_layer_name(slot) for group in groups.groups for slot in group.filter_slots}
    # of any other module that has a weight, the outputs may be something else
    layers: dict[str, nn.Module] = {
        name: layer
        for name, layer in module.named_modules()
        if name in wanted and isinstance(layer, _ConvNd | nn.Linear)
    }
    if bare := sorted(wanted - layers.keys()):
        raise GraphError(
            f"This criterion needs the outputs of layers; {bare[0]!r} is a parameter of no layer, "
            f"or of a module that is neither a convolution nor nn.Linear."
        )
    return layers


@contextmanager
def _outputs(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Layer name -> the outputs of its calls inside the context."""
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    handles = [
        layer.register_forward_hook(_keep_output(outputs[name])) for name, layer in layers.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _layer_name(slot: Slot) -> str:
    return slot.tensor.removesuffix(".weight")


def _keep_output(outputs: list[Tensor]) -> Callable[..., Tensor]:
    def hook(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        # an in-place activation after the layer must not overwrite what is kept
        outputs.append(output)
        return output.clone()

    return hook


def _channels_second(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A layer's input or output as (N, C, positions...), with at least one positions dimension."""
    if isinstance(layer, nn.Linear):
        tensor = tensor.movedim(-1, 1)
    return tensor if tensor.ndim > 2 else tensor[..., None]


# --- weights and their gradients ------------------------------------------------------------------


def taylor_weight_scores(module: nn.Module, groups: ChannelGroups, batches: Batches) -> Scores:
    """Σ E(g · w)² over all parameters of the unit (Molchanov et al., 2019).

    g is the gradient of one batch's mean cross-entropy, E the mean over batches. The paper has two
    forms; this one adds the squares of single parameters and does not square their sum.
    """
    squares = _mean_gradients(module, batches, torch.square)
    return sum_over_slots(groups, _weighted(module, squares, torch.square))


def obd_scores(module: nn.Module, groups: ChannelGroups, batches: Batches) -> Scores:
    """Σ ½h · w² over all parameters of the unit (LeCun et al., 1990, "optimal brain damage").

    The Hessian's diagonal h is approximated by that of the empirical Fisher information, the mean
    square of single images' gradients. This takes one backward pass per image.
    """
    images = ((i[None], k[None]) for batch in batches for i, k in zip(*batch, strict=True))
    diagonal = _mean_gradients(module, images, torch.square)
    return sum_over_slots(groups, _weighted(module, diagonal, lambda w: w.square() / 2))


def snip_scores(module: nn.Module, groups: ChannelGroups, batches: Batches) -> Scores:
    """Σ|g · w| over the channel's filters, g the gradient on all the images (Lee et al., 2019).

    Their division by the sum over the whole network changes no rank and is left out.
    """
    gradients = _mean_gradients(module, batches, lambda gradient: gradient)
    signed = _weighted(module, gradients, lambda w: w)
    return sum_over_filters(groups, {name: product.abs() for name, product in signed.items()})


def _mean_gradients(
    module: nn.Module, batches: Batches, term: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Parameter name -> mean over batches, weighted by images, of `term` of the gradient."""
    parameters = {
        name: parameter.detach().requires_grad_() for name, parameter in module.named_parameters()
    }
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    with _differentiable(module):
        for images, labels in batches:
            loss = _loss(module, images, labels, parameters)
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += term(gradient) * len(labels)
            count += len(labels)
    return {name: total.detach() / _at_least_one(count) for name, total in sums.items()}


def _weighted(
    module: nn.Module, factors: dict[str, Tensor], of_weight: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Parameter name -> factor · of_weight(w)."""
    return {name: factors[name] * of_weight(w.detach()) for name, w in module.named_parameters()}


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Eval mode and gradients, until after the backward pass: checkpoints compute again there."""
    with evaluating(module), torch.enable_grad(), UnitStrides():
        yield


def _loss(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    parameters: dict[str, Tensor] | None = None,
) -> Tensor:
    """The mean cross-entropy, with `parameters` in place of the module's own."""
    # a copy, because forward may begin with an in-place operation
    logits = functional_call(module, parameters or {}, (images.clone(),))
    check_labels(labels, logits)
    if not logits.requires_grad:
        raise GraphError("This criterion needs gradients, and forward computes its output without.")
    return functional.cross_entropy(logits, labels)


def _at_least_one(count: int) -> int:
    if count == 0:
        raise ZooError("This criterion needs data, and there are no batches.")
    return count


# --- zeros ----------------------------------------------------------------------------------------


def apoz_scores(module: nn.Module, groups: ChannelGroups, batches: Batches) -> Scores:
    """The fraction of nonzeros after the channel's activation: 1 - APoZ (Hu et al., 2016).

    They are counted in the inputs of the layers that read the channel, after any pooling in
    between. A channel that reaches these layers without an activation scores 1.

    Raises:
        ZooError: when there are no batches, or nothing is ever zero, as after SiLU or GELU.
    """
    columns = {
        name: _dim_of_inputs(layer)
        for name, layer in module.named_modules()
        if isinstance(layer, _ConvNd | nn.Linear)
    }
    readers = [
        [slot for slot in group.slots if columns.get(_layer_name(slot)) == slot.dim]
        for group in groups.groups
    ]
    counts: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            _count_zeros(name, counts), with_kwargs=True
        )
        for name in {_layer_name(slot) for slots in readers for slot in slots}
    ]
    try:
        with evaluating(module), torch.no_grad():
            images = sum(len(module(images.clone())) for images, _ in batches)
    finally:
        for handle in handles:
            handle.remove()
    _at_least_one(images)
    if not any(zeros.any() for zeros, _ in counts.values()):
        raise ZooError(
            "The criterion 'apoz' counts zeros after activations; this network has none."
        )
    scores = []
    for group, slots in zip(groups.groups, readers, strict=True):
        zeros, values = torch.zeros(2, group.size, dtype=torch.int64)
        for slot in slots:
            if _layer_name(slot) in counts:
                found = per_unit(counts[_layer_name(slot)], slot, group.size)
                zeros, values = zeros + found[0], values + found[1]
        scores.append((1 - zeros / values.clamp(min=1)).tolist())
    return scores


def _dim_of_inputs(layer: _ConvNd | nn.Linear) -> int:
    """Index of the input dimension of a layer's weight."""
    return 0 if isinstance(layer, _ConvTransposeNd) else 1


def _count_zeros(name: str, counts: dict[str, Tensor]) -> Callable[..., None]:
    """A hook that counts zeros and values of a layer's input, per input column of its weight."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        assert isinstance(layer, _ConvNd | nn.Linear)
        given = inputs[0] if inputs else named["input"]
        values = _channels_second(layer, given).flatten(2)
        # a column of a grouped convolution's weight reads one channel of every group
        width = layer.weight.shape[_dim_of_inputs(layer)]
        columns = (values == 0).view(len(values), -1, width, values.shape[2])
        zeros = columns.sum((0, 1, 3)).cpu()
        total = columns.numel() // columns.shape[2]
        counts[name] = counts.get(name, 0) + torch.stack([zeros, torch.full_like(zeros, total)])

    return hook
