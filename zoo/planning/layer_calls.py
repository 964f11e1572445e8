"""The calls of a network's convolutions and dense layers in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from zoo.errors import ZooError, first_line
from zoo.spec.groups import ChannelGroups
from zoo.surgery.surgery import evaluating
from zoo.tracing.calls import Inputs, call, described

__all__ = ["LayerCall", "layer_calls"]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        weight: its name.
        shape: of the weight.
        images: the shape of the input.
        options: a convolution's stride, padding and dilation; a dense layer has none.
        normalised: a batch norm follows.
        capped: and then a ReLU6, which runtimes do not compute like a ReLU.
    """

    weight: str
    shape: tuple[int, ...]
    images: tuple[int, ...]
    options: tuple[Any, ...] = ()
    groups: int = 1
    normalised: bool = False
    capped: bool = False

    @property
    def depthwise(self) -> bool:
        """Whether removing an input removes a group, rather than an input of every group."""
        return self.groups > 1 and self.shape[1] == 1

    @property
    def unit(self) -> int:
        """Any number of outputs must be a multiple of this."""
        return self.shape[0] // self.groups if self.depthwise else self.groups

    def resized(self, outputs: int, inputs: int) -> LayerCall:
        """The same call with other lengths of its weight's first two dimensions."""
        shape = (outputs, inputs, *self.shape[2:])
        if len(shape) == 2:
            return replace(self, shape=shape, images=(*self.images[:-1], inputs))
        groups = outputs // self.unit if self.depthwise else self.groups
        images = (self.images[0], inputs * groups, *self.images[2:])
        return replace(self, shape=shape, images=images, groups=groups)

    def runner(self, like: Tensor) -> Callable[[], Tensor]:
        """A function that makes the call, with tensors like `like`."""
        images, weight = like.new_ones(self.images), like.new_ones(self.shape)
        if len(self.shape) == 2:
            return lambda: F.linear(images, weight)
        stride, padding, dilation = self.options
        name = f"conv{len(self.shape) - 2}d"

        def convolve() -> Tensor:
            return getattr(F, name)(images, weight, None, stride, padding, dilation, self.groups)

        if not self.normalised:
            return convolve
        one = like.new_ones(self.shape[0])
        return lambda: F.relu(F.batch_norm(convolve(), one, one, one, one))


def layer_calls(module: nn.Module, groups: ChannelGroups, inputs: Inputs) -> list[LayerCall]:
    """The calls of the layers in one forward pass, in order."""
    calls: list[LayerCall] = []
    outputs: dict[int, tuple[int, Tensor]] = {}  # the tensors are kept, so that no id is reused
    last: tuple[int, Tensor] | None = None  # the latest output of a batch norm

    def record(weight: str, layer: Any, given: tuple[Tensor], output: Tensor) -> None:
        made = LayerCall(weight, tuple(layer.weight.shape), tuple(given[0].shape))
        if isinstance(layer, _ConvNd):
            options = (layer.stride, layer.padding, layer.dilation)
            made = replace(made, options=options, groups=layer.groups)
        outputs[id(output)] = len(calls), output
        calls.append(made)

    def mark(_: nn.Module, given: tuple[Tensor]) -> None:
        if id(given[0]) in outputs:
            index = outputs[id(given[0])][0]
            calls[index] = replace(calls[index], normalised=True)

    def keep(norm: Any, given: tuple[Tensor], output: Tensor) -> None:
        nonlocal last
        last = None
        if id(given[0]) in outputs:
            last = outputs[id(given[0])][0], output
            if isinstance(getattr(norm, "act", None), nn.ReLU6):  # as in timm's batch norms
                cap(norm, (output,))

    def cap(_: nn.Module, given: tuple[Tensor]) -> None:
        if last is not None and last[1] is given[0]:
            calls[last[0]] = replace(calls[last[0]], capped=True)

    hooks = []
    for name, layer in module.named_modules():
        weight = f"{name}.weight".removeprefix(".")
        timed = isinstance(layer, (_ConvNd, nn.Linear)) and not isinstance(layer, _ConvTransposeNd)
        if timed and weight in groups.positions:
            hooks.append(layer.register_forward_hook(partial(record, weight)))
        elif isinstance(layer, _BatchNorm):
            hooks += [layer.register_forward_pre_hook(mark), layer.register_forward_hook(keep)]
        elif isinstance(layer, nn.ReLU6):
            hooks.append(layer.register_forward_pre_hook(cap))
    try:
        with evaluating(module), torch.inference_mode():
            call(module, inputs)
    except Exception as error:  # whatever the network raises
        reason = first_line(error)
        raise ZooError(
            f"Latency is measured on inputs of shape {described(inputs)}, which "
            f"{type(module).__name__} does not run on: {reason}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls
