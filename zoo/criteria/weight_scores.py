"""Scores that need no images: one per channel of each group; the highest stay.

Where several filters produce a channel, or several batch norms scale it, their scores are summed.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from zoo.errors import GraphError
from zoo.spec.groups import ChannelGroups, Group, Slot
from zoo.surgery.surgery import named_tensors
from zoo.tracing.calls import call, example_for, leaves

__all__ = [
    "Scores",
    "along",
    "bn_scale_scores",
    "fpgm_scores",
    "l1_scores",
    "l2_scores",
    "per_unit",
    "random_scores",
    "sum_over_filters",
    "sum_over_slots",
    "synflow_scores",
]

Scores = list[list[float]]


def random_scores(groups: ChannelGroups, seed: int) -> Scores:
    """One random permutation per group (paper, eq. 6): a smaller width keeps a subset.

    A group's permutation depends on the seed and its name alone.
    """
    scores = []
    for group in groups.groups:
        order = list(range(group.size))
        random.Random(f"{seed}:{group.name}").shuffle(order)
        scores.append([float(rank) for rank in order])
    return scores


def l1_scores(module: nn.Module, groups: ChannelGroups) -> Scores:
    """Σ|w| of the channel's filters (paper, section 2.2; Li et al., 2017)."""
    return _of_filters(module, groups, lambda filters: filters.abs().sum(1))


def l2_scores(module: nn.Module, groups: ChannelGroups) -> Scores:
    """√Σw² of each of the channel's filters, summed (Li et al., 2017)."""
    return _of_filters(module, groups, lambda filters: filters.norm(dim=1))


def fpgm_scores(module: nn.Module, groups: ChannelGroups) -> Scores:
    """Σⱼ‖wᵢ - wⱼ‖₂ over the filters j of the layer (He et al., 2019, "FPGM").

    The filters nearest to their layer's geometric median are the ones that others can replace.
    """
    return _of_filters(module, groups, lambda filters: torch.cdist(filters, filters).sum(1))


def bn_scale_scores(module: nn.Module, groups: ChannelGroups) -> Scores:
    """|γ| of the batch norms that scale the channel, summed (Liu et al., 2017, "network slimming").

    Raises:
        GraphError: for a group whose channels no batch norm scales.
    """
    scales = {
        f"{name}.weight": layer.weight.detach().abs()
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.affine
    }
    for group in groups.groups:
        if not any(slot.tensor in scales for slot in group.slots):
            raise GraphError(
                f"The criterion 'bn_scale' needs a batch norm after every channel group; none "
                f"scales the channels of {group.name!r}."
            )
    return sum_over_slots(groups, scales)


def synflow_scores(module: nn.Module, groups: ChannelGroups) -> Scores:
    """Σ|θ · ∂R/∂θ|, R = 1ᵀ Π|θ| 1, over the channel's filters (Tanaka et al., 2020).

    R is the sum of all outputs for one image of ones. It comes from a copy in float64 and eval mode
    that is linear and has no negative values: weights are absolute, biases and running means zero.
    Activations are left out, because they pass on positive values. Gates such as a sigmoid stay.

    Raises:
        GraphError: if R overflows.
    """
    linear = copy.deepcopy(module).double().eval().requires_grad_()
    with torch.no_grad():
        for name, tensor in named_tensors(linear).items():
            if name.endswith(("bias", "running_mean")):
                tensor.zero_()
            elif tensor.is_floating_point():
                tensor.abs_()
    parameters = dict(linear.named_parameters())
    ones = example_for(linear, groups.image_size, groups.inputs, torch.ones, 1)
    with torch.enable_grad(), _Linear():
        outputs = leaves(call(linear, ones))
        flow = torch.stack([output.sum() for output in outputs if output.requires_grad]).sum()
        gradients = torch.autograd.grad(flow, list(parameters.values()), materialize_grads=True)
    if not torch.isfinite(flow):
        raise GraphError("The criterion 'synflow' overflows float64 in a network of this depth.")
    products = zip(parameters.items(), gradients, strict=True)
    return sum_over_filters(groups, {name: (w * g).abs() for (name, w), g in products})


_ACTIVATIONS = frozenset(
    getattr(home, name + suffix)
    for home in (torch, functional, torch.Tensor)
    for name in (
        "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu",
        "mish", "hardswish", "softplus",
    )
    for suffix in ("", "_")
    if hasattr(home, name + suffix)
)  # fmt: skip


class _Linear(TorchFunctionMode):
    """Makes activations return their input, be they called as module, function or method.

    For large inputs they do so anyway, except the bounded ones.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in _ACTIVATIONS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


# --- from tensors to units ------------------------------------------------------------------------


def per_unit(rows: Tensor, slot: Slot, size: int) -> Tensor:
    """`rows` (..., positions along the slot's dimension) summed per unit: (..., size)."""
    positions = [list(slot.positions(unit)) for unit in range(size)]
    return rows[..., torch.tensor(positions, device=rows.device)].sum(-1)


def sum_over_filters(groups: ChannelGroups, values: Mapping[str, Tensor]) -> Scores:
    """Per unit, the sum of `values` (weight name -> one per element) over its filters."""
    return [_total(group, group.filter_slots, values) for group in groups.groups]


def sum_over_slots(groups: ChannelGroups, values: Mapping[str, Tensor]) -> Scores:
    """Per unit, the sum of `values` (tensor name -> one per element) over all its positions."""
    return [
        _total(group, [slot for slot in group.slots if slot.tensor in values], values)
        for group in groups.groups
    ]


def _total(group: Group, slots: Sequence[Slot], values: Mapping[str, Tensor]) -> list[float]:
    total = torch.zeros(group.size, dtype=torch.float64)
    for slot in slots:
        rows = along(values[slot.tensor].detach(), slot).sum(1).cpu().double()
        total += per_unit(rows, slot, group.size)
    return total.tolist()


def along(tensor: Tensor, slot: Slot) -> Tensor:
    """`tensor` as (positions of the slot's dimension, elements of each): one filter per row."""
    rows = tensor.movedim(slot.dim, 0)
    return rows.reshape(len(rows), -1)


def _of_filters(
    module: nn.Module, groups: ChannelGroups, score: Callable[[Tensor], Tensor]
) -> Scores:
    """Per unit, the sum of `score`, (filters, elements of each) -> (filters,), over its weights."""
    tensors = named_tensors(module)

    @functools.cache
    def of_weight(slot: Slot) -> Tensor:
        return score(along(tensors[slot.tensor].detach().double(), slot)).cpu()

    scores = []
    for group in groups.groups:
        of_slots = [per_unit(of_weight(slot), slot, group.size) for slot in group.filter_slots]
        scores.append(torch.stack(of_slots).sum(0).tolist())
    return scores
