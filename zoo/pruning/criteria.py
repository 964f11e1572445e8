"""Criteria: which channels of a group to keep. One score per channel; the highest stay."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset

from zoo.data import DeviceLoader, ImageSet, check_labels
from zoo.errors import DataError, ZooError, unknown
from zoo.groups import ChannelGroups, Group
from zoo.pruning.surgery import evaluating, named_tensors

__all__ = [
    "CRITERIA",
    "Criterion",
    "channel_scores",
    "labelled_batches",
    "random_scores",
    "taylor_features",
]

Batches = Iterable[tuple[Tensor, Tensor]]
Scores = list[list[float]]


def labelled_batches(
    data: Dataset | DataLoader, device: torch.device | str, seed: int, count: int = 1024
) -> Batches:
    """At least `count` images of `data`, or all there are, in batches (images, labels) on `device`.

    Those of a Dataset are drawn by `seed`, because many are sorted by class; of a DataLoader or an
    IterableDataset they are the first.

    Raises:
        DataError: for anything but (image, label) with floating-point images and integer labels.
    """
    batches: Iterable
    if isinstance(data, DataLoader):
        batches = data
    elif isinstance(data, ImageSet):
        batches = DeviceLoader(data, 128, device=device, shuffle=True, seed=seed)
    elif isinstance(data, Dataset):
        shuffle = not isinstance(data, IterableDataset) and len(data) > 0  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        batches = DataLoader(data, 128, shuffle=shuffle, generator=generator)
    else:
        raise DataError(f"Expected a torch Dataset or DataLoader, got {type(data).__name__}.")
    taken: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        images, labels = _checked(batch)
        taken.append((images.to(device), labels.to(device)))
        if sum(len(rows) for _, rows in taken) >= count:
            break
    return taken


def _checked(batch: object) -> tuple[Tensor, Tensor]:
    if isinstance(batch, list | tuple) and len(batch) == 2:
        images, labels = batch
        if (
            isinstance(images, Tensor)
            and isinstance(labels, Tensor)
            and (images.ndim, labels.ndim) == (4, 1)
            and images.is_floating_point()
            and not labels.is_floating_point()
        ):
            return images, labels
    raise DataError(
        "Expected data of (image, label): images as floating-point tensors (C, H, W), labels as "
        "integers."
    )


def random_scores(groups: ChannelGroups, seed: int) -> Scores:
    """One random permutation per group (paper, eq. 6): what is kept is nested in the width.

    A group's permutation depends on the seed and its name alone.
    """
    scores = []
    for group in groups.groups:
        order = list(range(group.size))
        random.Random(f"{seed}:{group.name}").shuffle(order)
        scores.append([float(rank) for rank in order])
    return scores


def l1_scores(module: nn.Module, groups: ChannelGroups) -> Scores:
    """Σ|w| over all filters that produce the channel (paper, section 2.2)."""
    tensors = named_tensors(module)
    return [
        _per_unit(group, {f: tensors[f].detach().abs().flatten(1).sum(1) for f in group.filters})
        for group in groups.groups
    ]


def taylor_features(module: nn.Module, groups: ChannelGroups, batches: Batches) -> list[Tensor]:
    """E|∂ε/∂L · L| per channel, ε the mean cross-entropy (paper, eq. 9; Molchanov et al., 2016).

    The mean is over images and positions, with the absolute value inside; L is the output of the
    layers that produce the group, summed over them where several do.

    Args:
        module: the network, evaluated in eval mode; neither its weights nor its mode change.
        groups: its channel groups.
        batches: (images, labels) on the module's device.

    Returns:
        One tensor (group size,) per group.

    Raises:
        DataError: when a label does not fit the network's outputs.
        ZooError: when there are no batches, or channels come from a parameter that is no layer's.
    """
    wanted = {f.removesuffix(".weight") for group in groups.groups for f in group.filters}
    layers = {name: layer for name, layer in module.named_modules() if name in wanted}
    if bare := sorted(wanted - layers.keys()):
        raise ZooError(
            f"Taylor features need the outputs of layers; {bare[0]!r} is a parameter of no layer."
        )
    sums: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(_keep_output(name, outputs)) for name, layer in layers.items()
    ]
    count = 0
    try:
        with evaluating(module), torch.enable_grad():
            for images, labels in batches:
                # gradients reach the layers of a frozen network through its input
                logits = module(images.detach().requires_grad_())
                check_labels(labels, logits)
                loss = functional.cross_entropy(logits, labels)
                names = list(outputs)
                gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
                for name, gradient in zip(names, gradients, strict=True):
                    # the loss is a mean over the batch; ε is per image
                    product = (gradient * outputs[name]).detach().abs() * len(labels)
                    dims = [d for d in range(product.ndim) if d != 1]
                    sums[name] = sums.get(name, 0) + product.mean(dims) * len(labels)
                count += len(labels)
                outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ZooError("Taylor features need data, and there are no batches.")
    return [
        torch.tensor(_per_unit(g, {f: sums[f.removesuffix(".weight")] / count for f in g.filters}))
        for g in groups.groups
    ]


def _keep_output(name: str, outputs: dict[str, Tensor]) -> Callable[..., Tensor]:
    def hook(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        # an in-place activation after the layer must not overwrite what is kept
        outputs[name] = output
        return output.clone()

    return hook


def _per_unit(group: Group, per_row: dict[str, Tensor]) -> list[float]:
    """Scores of a weight's rows gathered per unit of the group, summed over slots and filters."""
    total = [0.0] * group.size
    for slot in group.slots:
        if slot.dim == 0 and slot.tensor in per_row:
            rows = per_row[slot.tensor].tolist()
            for unit in range(group.size):
                total[unit] += sum(rows[position] for position in slot.positions(unit))
    return total


@dataclass(frozen=True)
class Criterion:
    """`score`: (module, groups, seed, batches) -> scores; `needs_data`: whether it uses batches."""

    score: Callable[[nn.Module, ChannelGroups, int, Batches], Scores]
    needs_data: bool = False


CRITERIA: dict[str, Criterion] = {
    "random": Criterion(lambda _m, groups, seed, _b: random_scores(groups, seed)),
    "l1": Criterion(lambda module, groups, _s, _b: l1_scores(module, groups)),
    "taylor": Criterion(
        lambda module, groups, _s, batches: [
            row.tolist() for row in taylor_features(module, groups, batches)
        ],
        needs_data=True,
    ),
}


def channel_scores(
    name: str, module: nn.Module, groups: ChannelGroups, seed: int, batches: Batches | None
) -> Scores:
    """The scores that criterion `name` gives every channel of every group.

    Raises:
        ZooError: for an unknown criterion, or one that needs data when there is none.
    """
    if name not in CRITERIA:
        raise unknown("criterion", name, CRITERIA)
    criterion = CRITERIA[name]
    if criterion.needs_data and batches is None:
        raise ZooError(f"The criterion {name!r} needs data: pass data=, a Dataset or DataLoader.")
    return criterion.score(module, groups, seed, batches or ())
