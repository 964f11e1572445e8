"""Audit: whether the attributes of a pruned network are still true.

Attributes (`in_channels`, `num_features`, `feature_info`, ...) are compared with the shapes of
tensors, inputs and outputs in a forward pass, never with what the plan predicted. What was wrong in
the dense network may be wrong in the pruned one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from zoo.surgery.surgery import evaluating, width_attributes
from zoo.tracing.attributes import INPUTS, LIBRARIES, OUTPUTS, counted_child

__all__ = ["audit"]

Flows = dict[str, tuple[list[int], list[int]]]
"""Module -> sizes of dimension 1 and the last one, of inputs and outputs of its first call."""


@dataclass(frozen=True)
class Claim:
    """The value of an attribute, and the observed values, any of which makes it true."""

    said: Any
    seen: tuple[Any, ...]

    @property
    def holds(self) -> bool:
        return self.said in self.seen


def audit(dense: nn.Module, pruned: nn.Module, images: Tensor) -> list[str]:
    """The attributes that are true of `dense` and wrong in `pruned`, one message for each.

    Args:
        dense: the network before surgery.
        pruned: the network after it.
        images: one batch (N, C, H, W) that both accept.
    """
    before, after = _claims(dense, images), _claims(pruned, images)
    return [
        f"{name} is {after[name].said}, but {_listed(after[name].seen)} was observed"
        for name, claim in before.items()
        if claim.holds and not after[name].holds
    ]


def _listed(seen: tuple[Any, ...]) -> str:
    return " or ".join(map(str, dict.fromkeys(seen))) or "nothing"


def _claims(network: nn.Module, images: Tensor) -> dict[str, Claim]:
    """The claims of all modules of a network, by `<module>:<attribute>`."""
    found: dict[str, Claim] = {}
    with evaluating(network), torch.no_grad():
        flows = _flows(network, images)
        for path, layer in network.named_modules():
            if type(layer).__module__.startswith(LIBRARIES):
                found |= {f"{path}:{name}": claim for name, claim in _stored(layer)}
                if path in flows:
                    found |= {f"{path}:{name}": c for name, c in _flowing(layer, path, flows)}
        if hasattr(network, "feature_info") and hasattr(network, "forward_features"):
            found |= {f":{name}": claim for name, claim in _features(network, images)}
    return found


def _flows(network: nn.Module, images: Tensor) -> Flows:
    seen: Flows = {}

    def note(path: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.setdefault(path, (_channels((*args, *kwargs.values())), _channels(output)))

    handles = [
        layer.register_forward_hook(partial(note, path), with_kwargs=True)
        for path, layer in network.named_modules()
    ]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _channels(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [value.shape[1], value.shape[-1]] if value.ndim > 1 else []
    parts = value if isinstance(value, list | tuple) else ()
    return [size for part in parts for size in _channels(part)]


def _stored(layer: nn.Module) -> Iterator[tuple[str, Claim]]:
    """The claims of a torch layer about the shapes of its own tensors."""
    for kind, (names, shape) in TENSORS.items():
        if isinstance(layer, kind):
            tensors = (getattr(layer, name, None) for name in ("weight", "running_mean"))
            for tensor in tensors:
                if tensor is not None:
                    yield names, Claim(shape(layer), (tuple(tensor.shape),))
            return


def _convolution(layer: Any) -> tuple[int, ...]:
    into, out = layer.in_channels, layer.out_channels
    if layer.transposed:
        return (into, out // layer.groups, *layer.kernel_size)
    return (out, into // layer.groups, *layer.kernel_size)


TENSORS: dict[type[nn.Module], tuple[str, Callable[[Any], tuple[int, ...]]]] = {
    _ConvNd: ("in_channels, out_channels and groups", _convolution),
    nn.Linear: ("in_features and out_features", lambda x: (x.out_features, x.in_features)),
    _NormBase: ("num_features", lambda x: (x.num_features,)),
    nn.GroupNorm: ("num_channels", lambda x: (x.num_channels,)),
    nn.LayerNorm: ("normalized_shape", lambda x: tuple(x.normalized_shape)),
    nn.RMSNorm: ("normalized_shape", lambda x: tuple(x.normalized_shape)),
}
"""Layer class -> the attributes that give the shape of its tensors, and that shape."""


def _flowing(layer: nn.Module, path: str, flows: Flows) -> Iterator[tuple[str, Claim]]:
    """The claims of a module about the channels that flow in or out of it or of a child."""
    into, out = flows[path]
    for name, value in width_attributes(layer).items():
        base, _, item = name.partition(".")
        seen = (into if base in (*INPUTS, "groups") else []) + (out if base in OUTPUTS else [])
        child, side = counted_child(layer, base, item)
        if child:
            seen = flows.get(f"{path}.{child}".lstrip("."), (seen, seen))[side]
        if seen:
            yield name, Claim(value, tuple(seen))


def _features(network: Any, images: Tensor) -> Iterator[tuple[str, Claim]]:
    """The claims of a timm network about the channels of its features."""
    calls: dict[str, tuple[Any, Callable[[], Any]]] = {
        "num_features": (network.num_features, lambda: network.forward_features(images)),
        "head_hidden_size": (
            getattr(network, "head_hidden_size", None),
            lambda: network.forward_head(network.forward_features(images), pre_logits=True),
        ),
    }
    for number, entry in enumerate(network.feature_info):
        calls[f"feature_info.{number}.num_chs"] = (
            entry["num_chs"],
            partial(_intermediates, network, images, number),
        )
    for name, (said, look) in calls.items():
        try:
            seen = _channels(look())
        except Exception:  # whatever the network raises: what was not observed does not hold
            seen = []
        yield name, Claim(said, tuple(seen))


def _intermediates(network: Any, images: Tensor, number: int) -> list[Tensor]:
    return network.forward_intermediates(images, indices=[number], intermediates_only=True)
