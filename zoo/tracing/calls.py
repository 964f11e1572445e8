"""Calling a network with a tensor, tuple or dict of tensors, and reading its nested outputs."""

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

A dict is passed as named arguments if `forward` has them, else as one argument.
"""


def checked_inputs(inputs: Any) -> Inputs:
    """`inputs`, with a list converted to a tuple.

    Raises:
        GraphError: if they are not a tensor, tuple or dict of tensors, or if a tensor is empty.
    """
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    if isinstance(inputs, Tensor | tuple | Mapping):
        found = tensors_of(inputs)
        if found and all(isinstance(t, Tensor) and 0 not in t.shape for t in found):
            return inputs
    raise GraphError(
        f"The example input must be a batch of images (N, C, H, W), or whatever tensor, tuple or "
        f"dict of tensors the network takes, none of them empty; got {described(inputs)}."
    )


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors of `inputs`, in their order."""
    if isinstance(inputs, Mapping):
        return tuple(inputs.values())
    return inputs if isinstance(inputs, tuple) else (inputs,)


def mapped(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`inputs` with `function` applied to each tensor."""
    if isinstance(inputs, Mapping):
        return {name: function(tensor) for name, tensor in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(function(tensor) for tensor in inputs)
    return function(inputs)


def arguments(module: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named arguments of a call; the latter in the order of `forward`."""
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
    """The output of `module` for `inputs`."""
    args, kwargs = arguments(module, inputs)
    return module(*args, **kwargs)


def leaves(output: Any) -> tuple[Tensor, ...]:
    """All tensors of an output that nests tuples, lists, dicts and dataclasses."""
    return tuple(tensor for _, tensor in named_leaves(output))


def named_leaves(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """As `leaves`, each tensor with a name joined from its keys, fields and indices.

    A single tensor is named `logits`.
    """
    if isinstance(output, Tensor):
        yield path or "logits", output
        return
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        fields = dataclasses.fields(output)
        output = {field.name: getattr(output, field.name) for field in fields}
    elif hasattr(output, "_asdict"):
        output = output._asdict()
    if isinstance(output, Mapping):
        for key, part in output.items():
            yield from named_leaves(part, f"{path}_{key}".lstrip("_"))
    elif isinstance(output, tuple | list):
        for number, part in enumerate(output):
            yield from named_leaves(part, f"{path or 'output'}_{number}")


def batch_of(inputs: Inputs) -> int:
    """The batch size: the first dimension of the first tensor; 1 for a scalar."""
    return next(iter(tensors_of(inputs)[0].shape), 1)


def described(inputs: Any) -> str:
    """Shapes and dtypes of `inputs`, or their type if they are not tensors, for messages."""
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape)} of {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, Mapping):
        return f"{{{', '.join(f'{name!r}: {described(t)}' for name, t in inputs.items())}}}"
    if isinstance(inputs, tuple | list) and inputs:
        return f"[{', '.join(map(described, inputs))}]"
    return type(inputs).__name__


# --- shapes, and examples of them -----------------------------------------------------------------


def shapes_of(inputs: Inputs) -> tuple[InputShape, ...]:
    """Shapes, names and dtypes of `inputs`, from which `example_of` makes similar inputs."""
    names = inputs if isinstance(inputs, Mapping) else [""] * len(tensors_of(inputs))
    return tuple(
        InputShape(tuple(tensor.shape), name, str(tensor.dtype).removeprefix("torch."))
        for name, tensor in zip(names, tensors_of(inputs), strict=True)
    )


def input_shapes(
    module: nn.Module, image_size: int, inputs: tuple[InputShape, ...]
) -> tuple[InputShape, ...]:
    """`inputs`; if empty, one square image (1, C, size, size) with the C that `module` takes."""
    return inputs or (InputShape((1, image_channels(module), image_size, image_size)),)


def example_of(
    shapes: tuple[InputShape, ...], batch: int, fill: Callable[[tuple[int, ...]], Tensor]
) -> Inputs:
    """Inputs of these shapes with another batch size.

    Floating-point tensors come from `fill(shape)`. Integers are zeros, because they may be indices
    into a table; masks are true.
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
    """An example input for `module`, on its device and of its dtype.

    The batch size defaults to that of `inputs`.
    """
    shapes, own = input_shapes(module, image_size, inputs), next(module.parameters())
    made = example_of(shapes, shapes[0].shape[0] if batch is None else batch, fill)
    return mapped(lambda t: t.to(own.device, own.dtype if t.is_floating_point() else t.dtype), made)


def image_channels(module: nn.Module) -> int:
    """The image channels that a network takes: those of its first convolution, else 3."""
    layers = (layer for layer in module.modules() if isinstance(layer, _ConvNd))
    return next((layer.in_channels for layer in layers), 3)
