"""A network as its own traced program, in which the constants that may be widths can be changed.

`x.view(-1, 32 * 8 * 8)` in a `forward` ties the width of a layer to a number that surgery cannot
reach. Here the program is a module with the parameters and buffers under their names, every
operator that is told lengths is a module that keeps them as a list, and so `zoo.tracing.attributes`
finds the ones that count channels as it finds those of any layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from zoo.errors import GraphError
from zoo.tracing.calls import Inputs, batch_of, mapped, tensors_of
from zoo.tracing.exporting import export_module
from zoo.tracing.program import SHAPE_OPERATORS, operator_name

__all__ = ["SizedOperator", "rewritten"]

SWITCHES = ("training", "train")
"""The arguments by which an operator is told whether the network is being trained."""


def rewritten(module: nn.Module, inputs: Inputs) -> nn.Module:
    """`module` as its traced program, for inputs of any batch; no tensor is copied.

    It computes what `module` computes in eval mode. In training mode batch norm and dropout do what
    they do then, and everything else is as it was traced: branches on `self.training`, stochastic
    depth and auxiliary heads are not there.

    Args:
        module: the dense network.
        inputs: what it is called with.

    Raises:
        GraphError: if it cannot be traced, or not for other batches than this one.
    """
    count = batch_of(inputs)
    pair = mapped(lambda t: torch.cat([t, t]) if t.ndim and len(t) == count == 1 else t, inputs)
    traced = export_module(module, pair)
    graph = traced.graph
    traced.operators = holder = nn.Module()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(node for node in placeholders if isinstance(node.meta.get("val"), Tensor))
    if tensors_of(pair)[0].ndim and _is_fixed(first.meta["val"].shape[0]):
        raise GraphError(
            f"{type(module).__name__} cannot be rewritten: the batch of {batch_of(pair)} is a "
            f"constant in it too. Take it from the tensor (x.shape[0])."
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
    for node in graph.nodes:  # traced again, its own modules count and not those it came from
        node.meta.pop("nn_module_stack", None)
    return fx.GraphModule(traced, graph, type(module).__name__).eval()


def _is_fixed(size: Any) -> bool:
    """Whether a size is a number, or a symbol that can be but one."""
    return isinstance(size, int) or size.node.maybe_as_int() is not None


def _operator(node: fx.Node) -> nn.Module | None:
    """The module that takes the place of an operator; None where it may stay one."""
    if operator_name(node) in SHAPE_OPERATORS:
        return SizedOperator(node.target, node.args, node.kwargs)
    schema = getattr(node.target, "_schema", None)
    for index, argument in enumerate(schema.arguments if schema else ()):
        if argument.name in SWITCHES and index < len(node.args) and node.args[index] is False:
            return SwitchedOperator(node.target, node.args, node.kwargs, index)
    return None


class SizedOperator(nn.Module):
    """An operator of tensors that is told lengths, which are its attribute `sizes`.

    A view becomes a reshape, which takes tensors in channels-last as well.
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


class SwitchedOperator(nn.Module):
    """An operator that is told whether the network is being trained, by the mode of the module."""

    def __init__(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int
    ) -> None:
        super().__init__()
        self.target = target
        self._arguments, self._index = _template((args, kwargs), None), index

    def forward(self, *given: Any) -> Any:
        args, kwargs = _filled(self._arguments, iter(given), [])
        args = (*args[: self._index], self.training, *args[self._index + 1 :])
        return self.target(*args, **kwargs)


# --- arguments with gaps --------------------------------------------------------------------------

_GIVEN = "given"
"""Stands in a template for a value of the program."""


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
    """`arguments` without the values of the program, and with the lengths' numbers where asked."""
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
    """A place in a template: of the next value of the program, or of the length of a number."""

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
