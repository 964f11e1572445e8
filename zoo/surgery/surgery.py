"""Surgery: executes a plan as a new, smaller module. The caller's module is never edited."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from zoo.errors import GraphError, first_line
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan, kept_positions

__all__ = [
    "apply",
    "evaluating",
    "is_record",
    "is_repaired",
    "named_tensors",
    "resize",
    "resized",
    "width_attributes",
]


def apply(
    module: nn.Module, groups: ChannelGroups, plan: Plan, skeleton: nn.Module | None = None
) -> nn.Module:
    """A copy of `module` with only the channels that `plan` keeps; it shares no storage.

    If `module` was cut since `groups` were traced, `skeleton` is the network as it was then: one
    input per group may be what the cut has left of a grouped convolution, or a depthwise one's.

    Raises:
        GraphError: if a tensor of `module` has another shape than in `groups`.
    """
    tensors = {}
    kept = kept_positions(groups, plan.kept)
    for name, tensor in named_tensors(module).items():
        expected = groups.shapes.get(name)
        if expected is not None and tuple(tensor.shape) != expected:
            raise GraphError(
                f"{name} has shape {tuple(tensor.shape)}; the channel groups are for {expected}."
            )
        cut = tensor.detach()
        for dim, index in sorted(kept.get(name, {}).items(), reverse=True):  # rows last: faster
            cut = cut.index_select(dim, torch.from_numpy(index).to(cut.device))
        tensors[name] = cut if name in kept else cut.clone()
    return resized(module if skeleton is None else skeleton, tensors, plan.attributes)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by full name; tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts `module` in eval mode; afterwards every layer gets its former mode back.

    Raises:
        GraphError: if it has no modes, as a program of torch.export.
    """
    modes = {layer: layer.training for layer in module.modules()}
    try:
        try:
            module.eval()
        except NotImplementedError as error:
            raise GraphError(
                f"{type(module).__name__} cannot be put in eval mode: "
                f"{first_line(error).rstrip('.')}. In place of a program of torch.export, take the "
                f"network that it was made from."
            ) from error
        yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def resized(
    skeleton: nn.Module,
    tensors: Mapping[str, Tensor],
    attributes: Mapping[str, int] = MappingProxyType({}),
) -> nn.Module:
    """A copy of `skeleton` whose parameters and buffers are `tensors`, of any widths.

    Attributes that repeat a width (`in_channels`, `num_features`, ...) are set to agree with the
    tensors, and those in `attributes` (`<module>:<attribute>`) to their values. Tensors of the
    skeleton that `tensors` does not name are copied.

    Raises:
        GraphError: if `attributes` names anything but an integer attribute, or if an attribute of
            a layer cannot be copied.
    """
    memo: dict[int, object] = {}
    for name, old in named_tensors(skeleton).items():
        if id(old) not in memo:
            memo[id(old)] = _like(old, tensors[name] if name in tensors else old.detach().clone())
    # deepcopy refuses tensors of an autograd graph, and any beside fake ones
    for tensor in _plain_tensors(skeleton):
        memo.setdefault(id(tensor), tensor.detach().clone())
    with unset_fake_temporarily():  # a copy of a tensor inside an object would have no storage
        known = dict(memo)
        try:
            result = copy.deepcopy(skeleton, memo)
        except Exception as error:  # whatever the attribute raises
            raise GraphError(_not_copied(skeleton, known, error)) from error
    _repair(result, attributes)
    return result


def _not_copied(module: nn.Module, known: Mapping[int, object], error: Exception) -> str:
    """The message that names the attribute of a layer that copy.deepcopy fails on."""
    for path, layer in module.named_modules():
        for name, value in vars(layer).items():
            try:
                copy.deepcopy(value if name != "_modules" else None, dict(known))
            except Exception as failure:
                owner = f"The {type(layer).__name__} {path!r}" if path else type(layer).__name__
                return (
                    f"{owner} cannot be copied because of its attribute {name!r}: "
                    f"{first_line(failure)}. Prune the network without it."
                )
    return f"{type(module).__name__} cannot be copied: {first_line(error)}."


def _plain_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that layers keep as plain attributes, also in containers and records."""
    waiting: list[Any] = [
        value
        for layer in module.modules()
        for name, value in layer.__dict__.items()
        if name not in ("_parameters", "_buffers", "_modules")
    ]
    seen = set()
    for value in waiting:
        if isinstance(value, Tensor):
            yield value
        elif id(value) in seen:
            continue
        elif isinstance(value, list | tuple | set | deque):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif is_record(value):
            waiting.append(vars(value))
        seen.add(id(value))


def is_record(value: object) -> bool:
    """Whether `value` is a dataclass or a namespace: its `vars` are what it consists of."""
    if isinstance(value, type | nn.Module) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, SimpleNamespace) or is_dataclass(value)


def resize(module: nn.Module, tensors: Mapping[str, Tensor], attributes: Mapping[str, int]) -> None:
    """As `resized`, but in place; `tensors` must name all parameters and buffers."""
    new: dict[int, Tensor] = {}
    for path, layer in module.named_modules():
        for own in (layer._parameters, layer._buffers):
            for name, old in own.items():
                if old is not None:
                    full = f"{path}.{name}" if path else name
                    own[name] = new.setdefault(id(old), _like(old, tensors[full]))
    _repair(module, attributes)


def _like(old: Tensor, new: Tensor) -> Tensor:
    """`new` as a parameter, if `old` is one."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new.detach(), requires_grad=old.requires_grad)
    return new


def _repair(module: nn.Module, attributes: Mapping[str, int]) -> None:
    """Set the attributes that repeat a width, from the tensors and from `attributes`."""
    for layer in module.modules():
        for kind, repair in REPAIRS.items():
            if isinstance(layer, kind):
                repair(layer)
                break
    layers = dict(module.named_modules())
    for name, value in attributes.items():
        path, _, attribute = name.partition(":")
        if path not in layers or width_attributes(layers[path]).get(attribute) is None:
            raise GraphError(f"The network has no integer attribute {name!r} to set to {value}.")
        _set(layers[path].__dict__, attribute.split("."), value)


def width_attributes(layer: nn.Module) -> dict[str, int]:
    """The integer attributes of a module by name; those in lists and dicts by `name.key`."""
    found: dict[str, int] = {}

    def collect(name: str, value: object, depth: int) -> None:
        if isinstance(value, int) and not isinstance(value, bool):
            found[name] = value
        elif depth and isinstance(value, list | tuple):
            for index, item in enumerate(value):
                collect(f"{name}.{index}", item, depth - 1)
        elif depth and isinstance(value, dict):
            for key, item in value.items():
                collect(f"{name}.{key}", item, depth - 1)

    for name, value in layer.__dict__.items():
        if not name.startswith("_"):
            collect(name, value, 2)
    return found


def _set(container: Any, keys: list[str], value: int) -> None:
    """Set the integer at `keys` in nested dictionaries, lists and tuples."""
    key: Any = int(keys[0]) if isinstance(container, list | tuple) else keys[0]
    if len(keys) == 1:
        container[key] = value
        return
    inner = container[key]
    if isinstance(inner, tuple):
        items = list(inner)
        _set(items, keys[1:], value)
        container[key] = tuple(items)
    else:
        _set(inner, keys[1:], value)


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
    assert isinstance(layer, _NormBase)
    for tensor in (layer.weight, layer.running_mean):
        if tensor is not None:
            layer.num_features = tensor.shape[0]


def _repair_transposed_convolution(layer: nn.Module) -> None:
    assert isinstance(layer, _ConvTransposeNd)
    fan_in, per_group = layer.weight.shape[:2]
    if layer.groups > 1 and layer.groups == layer.in_channels:
        layer.groups = fan_in
    layer.in_channels, layer.out_channels = fan_in, per_group * layer.groups


def _repair_layer_norm(layer: nn.Module) -> None:
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    if layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)


def _repair_group_norm(layer: nn.Module) -> None:
    assert isinstance(layer, nn.GroupNorm)
    if layer.weight is not None:
        layer.num_channels = layer.weight.shape[0]


def is_repaired(layer: nn.Module) -> bool:
    """Whether `REPAIRS` sets the layer's widths from its tensors."""
    return isinstance(layer, tuple(REPAIRS)) and any(True for _ in layer.parameters())


REPAIRS: dict[type[nn.Module], Callable[[nn.Module], None]] = {
    _ConvTransposeNd: _repair_transposed_convolution,
    _ConvNd: _repair_convolution,
    nn.Linear: _repair_linear,
    _NormBase: _repair_batch_norm,
    nn.LayerNorm: _repair_layer_norm,
    nn.RMSNorm: _repair_layer_norm,
    nn.GroupNorm: _repair_group_norm,
}
"""Module class -> the function that sets its attributes from its tensors."""
