"""Surgery: executing a plan. A new, physically smaller module; the caller's is never edited."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from zoo.errors import GraphError
from zoo.groups import ChannelGroups
from zoo.pruning.plan import Plan

__all__ = ["apply", "evaluating", "kept_positions", "named_tensors", "resized"]


def apply(module: nn.Module, groups: ChannelGroups, plan: Plan) -> nn.Module:
    """A copy of `module` that has only the channels that `plan` keeps; no storage is shared.

    Raises:
        GraphError: if the tensors of `module` are not those that `groups` describe.
    """
    tensors = {}
    kept = kept_positions(groups, plan)
    for name, tensor in named_tensors(module).items():
        expected = groups.shapes.get(name)
        if expected is not None and tuple(tensor.shape) != expected:
            raise GraphError(
                f"{name} has shape {tuple(tensor.shape)}; the channel groups are for {expected}."
            )
        cut = tensor.detach()
        for dim, index in kept.get(name, {}).items():
            cut = cut.index_select(dim, torch.tensor(index, device=cut.device))
        tensors[name] = cut if name in kept else cut.clone()
    return resized(module, tensors)


def kept_positions(groups: ChannelGroups, plan: Plan) -> dict[str, dict[int, list[int]]]:
    """tensor name -> dimension -> the positions that remain, ascending; untouched ones left out."""
    removed: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for group in groups.groups:
        gone = sorted(set(range(group.size)) - set(plan.kept[group.name]))
        for slot in group.slots if gone else ():
            positions = removed[slot.tensor][slot.dim]
            for unit in gone:
                positions.update(slot.positions(unit))
    return {
        name: {
            dim: [p for p in range(groups.shapes[name][dim]) if p not in positions]
            for dim, positions in dims.items()
        }
        for name, dims in removed.items()
    }


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its full name; tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` is in eval mode inside; afterwards each of its layers is in its own mode again."""
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def resized(skeleton: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `skeleton` whose parameters and buffers are `tensors`, of whatever widths.

    Attributes that repeat a width (`in_channels`, `num_features`, ...) are set to agree. Tensors of
    the skeleton that `tensors` does not name are copied.
    """
    memo: dict[int, object] = {}
    for name, old in named_tensors(skeleton).items():
        if id(old) in memo:
            continue
        new = tensors[name] if name in tensors else old.detach().clone()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new.detach(), requires_grad=old.requires_grad)
        memo[id(old)] = new
    result = copy.deepcopy(skeleton, memo)
    for layer in result.modules():
        for kind, repair in REPAIRS.items():
            if isinstance(layer, kind):
                repair(layer)
                break
    return result


def _repair_convolution(layer: nn.Module) -> None:
    assert isinstance(layer, _ConvNd)
    outputs, fan_in = layer.weight.shape[:2]
    if layer.groups > 1 and layer.groups == layer.in_channels:  # depthwise: one input per group
        layer.groups = outputs // (layer.out_channels // layer.groups)
    layer.in_channels, layer.out_channels = fan_in * layer.groups, outputs


def _repair_linear(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    layer.out_features, layer.in_features = layer.weight.shape


def _repair_batch_norm(layer: nn.Module) -> None:
    assert isinstance(layer, _BatchNorm)
    for tensor in (layer.weight, layer.running_mean):
        if tensor is not None:
            layer.num_features = tensor.shape[0]


REPAIRS: dict[type[nn.Module], Callable[[nn.Module], None]] = {
    _ConvNd: _repair_convolution,
    nn.Linear: _repair_linear,
    _BatchNorm: _repair_batch_norm,
}
"""Per module class, how its attributes follow from its tensors."""
