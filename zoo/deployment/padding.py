"""Widths of whole blocks: a pruned network with channels of zeros added computes the same."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from zoo.deployment.parity import compare_outputs, outputs_of
from zoo.errors import ExportError, ZooError
from zoo.models import parameter_count
from zoo.spec.groups import ChannelGroups, Group
from zoo.spec.plan import attribute_values, kept_positions, record_of
from zoo.storage.artefacts import skeleton_of
from zoo.surgery.surgery import named_tensors, resized
from zoo.tracing.calls import Inputs
from zoo.tracing.known_groups import groups_of

__all__ = ["padded", "padded_alike"]

BLOCK = 8
"""Channels that tensor cores (fp16) and ONNX Runtime on CPUs take at once, or in a multiple of."""

SAME = 1e-5
"""Of the largest value, if that exceeds 1: what single precision makes of one computation."""


def padded_alike(model: nn.Module, inputs: Inputs, asked: int | None) -> tuple[nn.Module, int, str]:
    """A network with wider widths, what they are multiples of, and why not; itself with 1.

    Args:
        model: pruned or not, on the CPU and in eval mode.
        inputs: that channels of zeros must not change the outputs of.
        asked: by default `BLOCK`, where a pruned network can have it.

    Raises:
        ZooError: as `padded`, or if the outputs change; not by default, which gives the reason.
    """
    multiple = BLOCK if asked is None else asked
    if multiple == 1 or (asked is None and record_of(model) is None):
        return model, 1, ""
    try:
        wider = padded(model, multiple)
        if parameter_count(wider) == parameter_count(model):
            return model, 1, ""
        try:
            own, padded_ones = (outputs_of(network, inputs) for network in (model, wider))
            result = compare_outputs(own, padded_ones, 0.0)
        except ExportError as error:
            raise ExportError(f"The network cannot be padded. {error}") from error
        if not result.relative_difference <= SAME:
            raise ExportError(
                "The network cannot be padded: something in it, a normalisation over channels say, "
                "depends on how many there are. Export with pad=1."
            )
    except ZooError as error:
        if asked is not None:
            raise
        return model, 1, str(error)
    return wider, multiple, ""


def padded(model: nn.Module, multiple: int) -> nn.Module:
    """A copy of a pruned network with widths that are multiples of `multiple`, or as in the dense.

    Channels that were removed come back, with zeros in all of their places. Where a convolution has
    so few channels per group that it would become the dense one, it is left as it is. An operator
    that reduces or convolves over channels (layer normalisation, channel attention) computes
    something else with zeros among them; the caller compares.

    Args:
        model: as `zoo.load` or `zoo.load_pruned` made it; it may have been trained since.
        multiple: at least 1.

    Raises:
        ZooError: if the network was not pruned by its architecture's name, or its tensors are no
            longer those that were cut.
    """
    record = record_of(model)
    if record is None or not record.architecture:
        raise ZooError(
            f"Only a network that zoo.load pruned can be padded; this {type(model).__name__} does "
            f"not say which channels it lost. zoo.prune takes align= instead."
        )
    skeleton = skeleton_of(record)
    groups = groups_of(record.architecture, skeleton, record.size, record.in_channels)
    own = record.plan.kept
    if set(own) != set(groups.names) or any(own[g.name][-1] >= g.size for g in groups.groups):
        raise ZooError(
            f"The network cannot be padded: it was pruned by other channel groups than those that "
            f"{record.architecture} has here."
        )
    filled = {group.name: _filled(group, own[group.name], multiple) for group in groups.groups}
    before, after = (kept_positions(groups, kept) for kept in (own, filled))
    tensors = named_tensors(model)
    if missing := sorted(set(before) - set(tensors) - set(groups.attributes)):
        raise ZooError(f"The network cannot be padded: it has no {missing[0]} any more.")
    wide = {
        name: _spread(name, tensors[name].detach(), positions, after.get(name, {}), groups)
        for name, positions in before.items()
        if name in tensors
    }
    result = resized(model, wide, attribute_values(groups, filled))
    dense = dict(skeleton.named_modules())
    for name, layer in result.named_modules():
        twin = dense.get(name)
        if isinstance(layer, _ConvNd) and isinstance(twin, _ConvNd) and not layer.transposed:
            _regroup(layer, twin)
    return result


def _filled(group: Group, kept: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """The kept units of a group, and the first of the others up to the next whole block."""
    # of a grouped convolution, a unit owns one channel of every part
    per_unit = min((_channels(group, filters) for filters in group.filters), default=1)
    lacking = -len(kept) % (multiple // math.gcd(multiple, per_unit))
    if per_unit > 1 and len(kept) + lacking >= group.size:
        return kept
    others = sorted(set(range(group.size)).difference(kept))
    return tuple(sorted((*kept, *others[:lacking])))


def _channels(group: Group, filters: str) -> int:
    """How many filters of a weight belong to one unit."""
    own = [slot.block for slot in group.filter_slots if slot.tensor == filters]
    return max(1, sum(own))


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
                f"The network cannot be padded: {name} has shape {tuple(tensor.shape)}, and "
                f"{len(own)} positions in dimension {dim} were kept when it was pruned."
            )
        all_positions = after.get(dim, np.arange(groups.length(name, dim)))
        places = torch.from_numpy(np.searchsorted(all_positions, own)).to(tensor.device)
        shape = (*tensor.shape[:dim], len(all_positions), *tensor.shape[dim + 1 :])
        # a variance of 0 would be divided by
        empty = tensor.new_full(shape, 1 if name.endswith("running_var") else 0)
        tensor = empty.index_copy_(dim, places, tensor)
    return tensor


def _regroup(layer: _ConvNd, dense: _ConvNd) -> None:
    """Cut a convolution into parts as the dense one is: at width 1 it hides if it is depthwise."""
    outputs, fan_in = layer.weight.shape[:2]
    depthwise = dense.groups > 1 and dense.groups == dense.in_channels
    layer.groups = outputs * dense.groups // dense.out_channels if depthwise else dense.groups
    layer.in_channels, layer.out_channels = fan_in * layer.groups, outputs
