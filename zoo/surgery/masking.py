"""Masks: a plan executed with zeros on the dense network, as a reference for surgery."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from zoo.spec.groups import ChannelGroups, Group
from zoo.spec.plans import Plan, kept_positions
from zoo.surgery.surgery import named_tensors

__all__ = ["mask", "masked", "without"]


def masked(module: nn.Module, groups: ChannelGroups, plan: Plan) -> nn.Module:
    """A copy of `module`, of the same size, with zeros in every position that `plan` removes."""
    result = copy.deepcopy(module)
    mask(result, groups, plan)
    return result


def mask(module: nn.Module, groups: ChannelGroups, plan: Plan) -> None:
    """As `masked`, but in place."""
    tensors = named_tensors(module)
    with torch.no_grad():
        for name, dims in kept_positions(groups, plan.kept).items():
            for dim, index in dims.items() if name in tensors else ():
                tensor = tensors[name]
                gone = np.setdiff1d(np.arange(tensor.shape[dim]), index)
                tensor.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)


@contextmanager
def without(tensors: Mapping[str, Tensor], group: Group, units: Iterable[int]) -> Iterator[None]:
    """Inside the block, zero all positions of these units of a group; then restore them."""
    gone, saved = list(units), []
    for slot in group.slots:
        if slot.tensor in tensors:
            tensor = tensors[slot.tensor]
            positions = [position for unit in gone for position in slot.positions(unit)]
            index = torch.tensor(positions, dtype=torch.long, device=tensor.device)
            saved.append((tensor, slot.dim, index, tensor.index_select(slot.dim, index)))
            tensor.index_fill_(slot.dim, index, 0)
    try:
        yield
    finally:
        # backwards, because slots may overlap
        for tensor, dim, index, values in reversed(saved):
            tensor.index_copy_(dim, index, values)
