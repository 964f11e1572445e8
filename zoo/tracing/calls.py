"""Calling a network: a tensor, or a tuple or dict of them, in; tensors in any structure out."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from zoo.errors import GraphError
from zoo.spec.groups import InputShape

__all__ = [
    "Inputs",
    "arguments",
    "batch_of",
    "call",
    "checked_inputs",
    "described",
    "example_for",
    "example_of",
    "image_channels",
    "input_shapes",
    "leaves",
    "mapped",
    "named_leaves",
    "shapes_of",
    "tensors_of",
]

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
"""What a network is called with: one tensor, several in order, or several by name.

A dict is taken as named arguments where `forward` has them, else as the one argument it is.
"""


def checked_inputs(inputs: Any) -> Inputs:
    """`inputs`, a list of tensors as a tuple.

    Raises:
        GraphError: if they are no tensor, tuple or dict of tensors, or one of them holds nothing.
    """
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    if isinstance(inputs, Tensor | tuple | Mapping):
        found = tensors_of(inputs)
        if found and all(isinstance(t, Tensor) and 0 not in t.shape for t in found):
            return inputs
    raise GraphError(
        f"The example input is a batch of images (N, C, H, W), or whatever tensor, tuple or dict "
        f"of tensors the network takes, none of them empty; got {described(inputs)}."
    )


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors of `inputs`, in their order."""
    if isinstance(inputs, Mapping):
        return tuple(inputs.values())
    return inputs if isinstance(inputs, tuple) else (inputs,)


def mapped(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`inputs`, each tensor replaced by what `function` makes of it."""
    if isinstance(inputs, Mapping):
        return {name: function(tensor) for name, tensor in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(function(tensor) for tensor in inputs)
    return function(inputs)


def arguments(module: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named arguments, these in the order of `forward`."""
    if not isinstance(inputs, Mapping):
        return tensors_of(inputs), {}
    try:
        bound = inspect.signature(module.forward).bind(**inputs)
    except TypeError:
        return (dict(inputs),), {}
    named = bound.arguments
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return (), dict(named)


def call(module: nn.Module, inputs: Inputs) -> Any:
    """What `module` gives for `inputs`."""
    args, kwargs = arguments(module, inputs)
    return module(*args, **kwargs)


def leaves(output: Any) -> tuple[Tensor, ...]:
    """The tensors in what a network gives: nested tuples, lists, dicts and dataclasses of them."""
    return tuple(tensor for _, tensor in named_leaves(output))


def named_leaves(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """`leaves`, each with the keys and fields that it stands under.

    One alone is `logits`; in tuples and lists they are counted.
    """
    if isinstance(output, Tensor):
        yield path or "logits", output
        return
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = vars(output)
    elif hasattr(output, "_asdict"):
        output = output._asdict()
    if isinstance(output, Mapping):
        for key, part in output.items():
            yield from named_leaves(part, f"{path}_{key}".lstrip("_"))
    elif isinstance(output, tuple | list):
        for number, part in enumerate(output):
            yield from named_leaves(part, f"{path or 'output'}_{number}")


def batch_of(inputs: Inputs) -> int:
    """The first dimension of the first tensor; 1 for a scalar."""
    return next(iter(tensors_of(inputs)[0].shape), 1)


def described(inputs: Any) -> str:
    """Shapes, or what `inputs` are instead of tensors, for messages."""
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape)} of {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, Mapping):
        return f"{{{', '.join(f'{name!r}: {described(t)}' for name, t in inputs.items())}}}"
    if isinstance(inputs, tuple | list) and inputs:
        return f"[{', '.join(map(described, inputs))}]"
    return type(inputs).__name__


# --- shapes, and examples of them -----------------------------------------------------------------


def shapes_of(inputs: Inputs) -> tuple[InputShape, ...]:
    """What `example_of` needs to make inputs like these."""
    names = inputs if isinstance(inputs, Mapping) else [""] * len(tensors_of(inputs))
    return tuple(
        InputShape(tuple(tensor.shape), name, str(tensor.dtype).removeprefix("torch."))
        for name, tensor in zip(names, tensors_of(inputs), strict=True)
    )


def input_shapes(
    module: nn.Module, image_size: int, inputs: tuple[InputShape, ...]
) -> tuple[InputShape, ...]:
    """`inputs`, or where there are none, square images of the channels that `module` takes."""
    return inputs or (InputShape((1, image_channels(module), image_size, image_size)),)


def example_of(
    shapes: tuple[InputShape, ...], batch: int, fill: Callable[[tuple[int, ...]], Tensor]
) -> Inputs:
    """Inputs of these shapes with another batch.

    Floating-point tensors are what `fill` makes of a shape; integers are zeros, for they may be
    positions in a table, and masks are true.
    """

    def one(of: InputShape) -> Tensor:
        batched = of.shape[:1] == shapes[0].shape[:1]
        shape = (batch, *of.shape[1:]) if batched else of.shape
        dtype = getattr(torch, of.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            return fill(shape).to(dtype)
        return torch.full(shape, dtype is torch.bool, dtype=dtype)

    made = tuple(map(one, shapes))
    if shapes[0].name:
        return {of.name: tensor for of, tensor in zip(shapes, made, strict=True)}
    return made if len(made) > 1 else made[0]


def example_for(
    module: nn.Module,
    image_size: int,
    inputs: tuple[InputShape, ...],
    fill: Callable[[tuple[int, ...]], Tensor],
    batch: int | None = None,
) -> Inputs:
    """What `module` takes, by `input_shapes` and `example_of`, on its device and of its type.

    By default of the batch that `inputs` had.
    """
    shapes, own = input_shapes(module, image_size, inputs), next(module.parameters())
    made = example_of(shapes, shapes[0].shape[0] if batch is None else batch, fill)
    return mapped(lambda t: t.to(own.device, own.dtype if t.is_floating_point() else t.dtype), made)


def image_channels(module: nn.Module) -> int:
    """The channels that a network takes: those of its first convolution, or 3 without one."""
    layers = (layer for layer in module.modules() if isinstance(layer, _ConvNd))
    return next((layer.in_channels for layer in layers), 3)
