"""Masks: a plan executed with zeros on the dense network, as a reference for surgery."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan, kept_positions
from zoo.surgery.surgery import named_tensors

__all__ = ["mask", "masked"]


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
