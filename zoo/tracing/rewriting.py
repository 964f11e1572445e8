"""Turns a network into a module of its traced program, whose constants surgery can change.

`x.view(-1, 32 * 8 * 8)` in a `forward` ties the width of a layer to a number that surgery cannot
reach. In the program's module, parameters and buffers keep their names, and every operator with
lengths among its arguments is a submodule that holds them in a list. So `zoo.tracing.attributes`
finds the lengths that count channels as it does for any layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import GraphError
from zoo.tracing.calls import Inputs, batch_of, mapped, tensors_of
from zoo.tracing.exporting import export_module
from zoo.tracing.hooks import without_observers
from zoo.tracing.program import SHAPE_OPERATORS, operator_name

__all__ = ["SizedOperator", "rewritten"]

SWITCHES = ("training", "train")
"""The names of operators' arguments that switch to training mode."""

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
"""Operators whose groups follow the width of their input; those of transposed ones stay."""


def rewritten(module: nn.Module, inputs: Inputs) -> nn.Module:
    """The traced program of `module` as a module, for any batch size; no tensor is copied.

    It computes what `module` computes in eval mode. In training mode only batch norm and dropout
    change; branches on `self.training`, stochastic depth and auxiliary heads are not in it.

    Args:
        module: the dense network.
        inputs: what it is called with.

    Raises:
        GraphError: if it cannot be traced, or only for this batch size, or has a batch norm with
            momentum=None, whose average counts its own calls.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.momentum is None:
            raise GraphError(f"{name!r} cannot be rewritten: set a momentum in place of None.")
    count = batch_of(inputs)
    pair = mapped(lambda t: torch.cat([t, t]) if t.ndim and len(t) == count == 1 else t, inputs)
    traced = export_module(without_observers(module, pair), pair)
    graph = traced.graph
    traced.operators = holder = nn.Module()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(node for node in placeholders if isinstance(node.meta.get("val"), Tensor))
    if tensors_of(pair)[0].ndim and _is_fixed(first.meta["val"].shape[0]):
        raise GraphError(
            f"{type(module).__name__} cannot be rewritten: its batch size {batch_of(pair)} is a "
            f"constant in forward too. Take it from the tensor (x.shape[0])."
        )
    for node in list(graph.nodes):
        if node.op == "call_module" and node.name.startswith("_guards"):
            graph.erase_node(node)
        elif node.op == "call_function" and (operator := _operator(node)) is not None:
            holder.add_module(node.name, operator)
            given = [arg for arg in _flat((node.args, node.kwargs)) if isinstance(arg, fx.Node)]
            with graph.inserting_before(node):
                new = graph.call_module(f"operators.{node.name}", tuple(given))
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    for node in graph.nodes:  # when traced again, only the modules of the new graph count
        node.meta.pop("nn_module_stack", None)
    return fx.GraphModule(traced, graph, type(module).__name__).eval()


def _is_fixed(size: Any) -> bool:
    """Whether a size is an integer, or a symbol with a single possible value."""
    return isinstance(size, int) or size.node.maybe_as_int() is not None


def _operator(node: fx.Node) -> nn.Module | None:
    """The module that replaces an operator; None if the operator may stay."""
    if operator_name(node) in SHAPE_OPERATORS:
        return SizedOperator(node.target, node.args, node.kwargs)
    schema = getattr(node.target, "_schema", None)
    for index, argument in enumerate(schema.arguments if schema else ()):
        given = node.args[index] if index < len(node.args) else None
        if argument.name in SWITCHES and given is False:
            return SwitchedOperator(node.target, node.args, node.kwargs, index)
        if (
            operator_name(node) in CONVOLUTIONS
            and argument.name == "groups"
            and given not in (None, 1)
        ):
            return GroupedOperator(node.target, node.args, node.kwargs, index)
    return None


class SizedOperator(nn.Module):
    """An operator with lengths among its arguments, which are kept in the attribute `sizes`.

    A view becomes a reshape, which accepts channels-last tensors as well.
    """

    def __init__(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        aten = torch.ops.aten
        self.target = aten.reshape.default if target is aten.view.default else target
        self.sizes = [value for value in _flat((args, kwargs)) if _is_length(value)]
        self._arguments = _template((args, kwargs), iter(range(len(self.sizes))))

    def forward(self, *given: Any) -> Any:
        args, kwargs = _filled(self._arguments, iter(given), self.sizes)
        return self.target(*args, **kwargs)


class _AdaptedOperator(nn.Module):
    """An operator one of whose arguments is computed at every call."""

    def __init__(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int
    ) -> None:
        super().__init__()
        self.target = target
        self._arguments, self._index = _template((args, kwargs), None), index

    def argument(self, *given: Any) -> Any:
        """The argument, from the values of the program that the operator is given."""
        raise NotImplementedError

    def forward(self, *given: Any) -> Any:
        args, kwargs = _filled(self._arguments, iter(given), [])
        args = (*args[: self._index], self.argument(*given), *args[self._index + 1 :])
        return self.target(*args, **kwargs)


class SwitchedOperator(_AdaptedOperator):
    """An operator whose training argument follows the mode of this module."""

    def argument(self, *_: Any) -> bool:
        return self.training


class GroupedOperator(_AdaptedOperator):
    """A grouped convolution that counts its groups: input channels by those of a filter."""

    def argument(self, images: Tensor, weight: Tensor, *_: Any) -> int:
        return images.shape[1] // weight.shape[1]


# --- arguments with gaps --------------------------------------------------------------------------

_GIVEN = "given"
"""Marks the place of a value of the program in a template."""


def _is_length(value: Any) -> bool:
    return type(value) is int and value > 0


def _flat(arguments: Any) -> list[Any]:
    """The values in nested tuples, lists and dicts, in order."""
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, tuple | list):
        return [arguments]
    return [value for part in arguments for value in _flat(part)]


def _template(arguments: Any, numbers: Any) -> Any:
    """`arguments` with gaps for values of the program and, if `numbers` is given, for lengths."""
    if isinstance(arguments, dict):
        return {key: _template(value, numbers) for key, value in arguments.items()}
    if isinstance(arguments, tuple | list):
        return tuple(_template(value, numbers) for value in arguments)
    if isinstance(arguments, fx.Node):
        return _Gap(_GIVEN)
    if numbers is not None and _is_length(arguments):
        return _Gap(next(numbers))
    return arguments


class _Gap:
    """A gap in a template: for the next value of the program, or for `sizes[of]`."""

    def __init__(self, of: str | int) -> None:
        self.of = of


def _filled(template: Any, given: Any, sizes: list[int]) -> Any:
    if isinstance(template, dict):
        return {key: _filled(value, given, sizes) for key, value in template.items()}
    if isinstance(template, tuple):
        return tuple(_filled(value, given, sizes) for value in template)
    if isinstance(template, _Gap):
        return next(given) if template.of == _GIVEN else sizes[template.of]  # type: ignore[index]
    return template
