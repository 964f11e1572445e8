"""Widths of whole blocks: a pruned network with channels of zeros added computes the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from zoo.artefacts import skeleton_of
from zoo.errors import ZooError
from zoo.groups import ChannelGroups
from zoo.pruning.known_groups import groups_of
from zoo.pruning.plan import PruningRecord, attribute_values, kept_positions
from zoo.pruning.surgery import named_tensors, resized

__all__ = ["padded"]


def padded(model: nn.Module, multiple: int) -> nn.Module:
    """A copy of a pruned network with widths that are multiples of `multiple`, or as in the dense.

    Channels that were removed come back, with zeros in all of their places. An operator that
    reduces over channels (layer and group normalisation) computes something else with them; the
    caller compares.

    Args:
        model: as `zoo.load` or `zoo.load_pruned` made it; it may have been trained since.
        multiple: at least 1.

    Raises:
        ZooError: if the network was not pruned by its architecture's name, or its tensors are no
            longer those that were cut.
    """
    record = getattr(model, "pruning", None)
    if not isinstance(record, PruningRecord) or not record.architecture:
        raise ZooError(
            f"Only a network that zoo.load pruned can be padded; this {type(model).__name__} does "
            f"not say which channels it lost. zoo.prune takes align= instead."
        )
    groups = groups_of(record.architecture, skeleton_of(record), record.image_size)
    wider = _filled(groups, record.plan.kept, multiple)
    before, after = (kept_positions(groups, kept) for kept in (record.plan.kept, wider))
    tensors = {
        name: _spread(name, tensor.detach(), before[name], after.get(name, {}), groups)
        for name, tensor in named_tensors(model).items()
        if name in before
    }
    return resized(model, tensors, attribute_values(groups, wider))


def _filled(
    groups: ChannelGroups, kept: Mapping[str, tuple[int, ...]], multiple: int
) -> dict[str, tuple[int, ...]]:
    """The kept units of every group, and the first of the others up to the next multiple."""
    filled = {}
    for group in groups.groups:
        own = kept[group.name]
        lacking = -len(own) % multiple
        others = sorted(set(range(group.size)).difference(own))
        filled[group.name] = tuple(sorted((*own, *others[:lacking])))
    return filled


def _spread(
    name: str,
    tensor: Tensor,
    before: Mapping[int, np.ndarray],
    after: Mapping[int, np.ndarray],
    groups: ChannelGroups,
) -> Tensor:
    """`tensor`, which has the positions `before` of the dense one, with those `after`."""
    for dim, own in before.items():
        if tensor.ndim <= dim or tensor.shape[dim] != len(own):
            raise ZooError(
                f"{name} has shape {tuple(tensor.shape)}, and {len(own)} positions in dimension "
                f"{dim} were kept when it was pruned: it cannot be padded."
            )
        all_positions = after.get(dim, np.arange(groups.length(name, dim)))
        places = torch.from_numpy(np.searchsorted(all_positions, own)).to(tensor.device)
        shape = (*tensor.shape[:dim], len(all_positions), *tensor.shape[dim + 1 :])
        # a variance of 0 would be divided by
        empty = tensor.new_full(shape, 1 if name.endswith("running_var") else 0)
        tensor = empty.index_copy_(dim, places, tensor)
    return tensor
