"""Pad the widths of a pruned network with channels of zeros, which changes no output."""

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
from zoo.spec.plans import attribute_values, kept_positions, record_of
from zoo.storage.artefacts import skeleton_of
from zoo.surgery.surgery import named_tensors, resized
from zoo.tracing.calls import Inputs
from zoo.tracing.known_groups import groups_of

__all__ = ["padded", "padded_alike"]

BLOCK = 8
"""Tensor cores (fp16) and ONNX Runtime on CPUs are fast at multiples of this many channels."""

SAME = 1e-5
"""Allowed difference of outputs by float32's rounding, relative to the largest value."""


def padded_alike(model: nn.Module, inputs: Inputs, asked: int | None) -> tuple[nn.Module, int, str]:
    """(padded network, multiple, ""), or (`model`, 1, reason) if it is not padded.

    Args:
        model: pruned or not, on the CPU and in eval mode.
        inputs: a batch, to check that padding does not change the outputs.
        asked: the multiple; None is `BLOCK`, if `model` is pruned and can be padded.

    Raises:
        ZooError: if `asked` is given, and as `padded` or because the outputs change.
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
                "The network cannot be padded: something in it, as a normalisation over channels, "
                "depends on the number of channels. Export with pad=1."
            )
    except ZooError as error:
        if asked is not None:
            raise
        return model, 1, str(error)
    return wider, multiple, ""


def padded(model: nn.Module, multiple: int) -> nn.Module:
    """A copy of a pruned network with widths padded to multiples of `multiple`, or the dense width.

    Some removed channels come back, filled with zeros. A grouped convolution that would reach its
    dense width is left as it is. An operator that reduces or convolves over channels (layer
    normalisation, channel attention) computes something else with such channels: compare outputs.

    Args:
        model: as `zoo.load` or `zoo.load_pruned` made it; it may have been trained since.
        multiple: at least 1.

    Raises:
        ZooError: if the network was not pruned by its architecture's name, or its tensors no longer
            have the shapes of its plan.
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
            f"The network cannot be padded: it was pruned by other channel groups than those of "
            f"{record.architecture} here."
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
    """The kept units of a group, and the first of the others up to the next multiple."""
    # in a grouped convolution, a unit owns one channel of every group of the convolution
    per_unit = min((_channels(group, filters) for filters in group.filters), default=1)
    lacking = -len(kept) % (multiple // math.gcd(multiple, per_unit))
    if per_unit > 1 and len(kept) + lacking >= group.size:
        return kept
    others = sorted(set(range(group.size)).difference(kept))
    return tuple(sorted((*kept, *others[:lacking])))


def _channels(group: Group, filters: str) -> int:
    """How many filters of the weight `filters` belong to one unit."""
    own = [slot.block for slot in group.filter_slots if slot.tensor == filters]
    return max(1, sum(own))


def _spread(
    name: str,
    tensor: Tensor,
    before: Mapping[int, np.ndarray],
    after: Mapping[int, np.ndarray],
    groups: ChannelGroups,
) -> Tensor:
    """`tensor`, moved from the dense positions `before` to those `after`, with zeros between."""
    for dim, own in before.items():
        if tensor.ndim <= dim or tensor.shape[dim] != len(own):
            raise ZooError(
                f"The network cannot be padded: {name} has shape {tuple(tensor.shape)}, and "
                f"{len(own)} positions in dimension {dim} were kept when it was pruned."
            )
        all_positions = after.get(dim, np.arange(groups.length(name, dim)))
        places = torch.from_numpy(np.searchsorted(all_positions, own)).to(tensor.device)
        shape = (*tensor.shape[:dim], len(all_positions), *tensor.shape[dim + 1 :])
        # 1 and not 0, because batch norm divides by the variance
        empty = tensor.new_full(shape, 1 if name.endswith("running_var") else 0)
        tensor = empty.index_copy_(dim, places, tensor)
    return tensor


def _regroup(layer: _ConvNd, dense: _ConvNd) -> None:
    """Set `groups` as in the dense convolution: width 1 hides whether one is depthwise."""
    outputs, fan_in = layer.weight.shape[:2]
    depthwise = dense.groups > 1 and dense.groups == dense.in_channels
    layer.groups = outputs * dense.groups // dense.out_channels if depthwise else dense.groups
    layer.in_channels, layer.out_channels = fan_in * layer.groups, outputs
