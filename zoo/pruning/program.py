"""A network as a program: traced with `torch.export`, interpreted with channel labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from zoo.errors import GraphError
from zoo.pruning.operators import RULES, Labels, Trace, Value
from zoo.pruning.surgery import evaluating, named_tensors

__all__ = ["Call", "Constant", "Program", "interpret"]

_SHAPE_OPERATORS = {"view", "reshape", "_unsafe_view", "unflatten", "expand", "split", "chunk"}
_SHAPE_OPERATORS |= {"split_with_sizes", "slice", "repeat", "constant_pad_nd", "pad"}


@dataclass(frozen=True)
class Call:
    """One call of a leaf module: its path, and the labels and shape of what it returns."""

    path: str
    value: Value


@dataclass(frozen=True)
class Constant:
    """An integer argument that equals a prunable width: a constant, or derived from a shape."""

    path: str
    where: str
    value: int
    labels: Labels


@dataclass(frozen=True)
class Program:
    """A traced and interpreted network."""

    trace: Trace
    tensors: dict[str, Value]
    calls: tuple[Call, ...]
    constants: tuple[Constant, ...]
    output: Value
    image_size: int


def interpret(module: nn.Module, example_input: Tensor) -> Program:
    """Trace `module` in eval mode and pass channel labels through every operator.

    Raises:
        GraphError: if the network cannot be traced, or an operator has no rule.
    """
    try:
        with evaluating(module):
            exported = torch.export.export(module, (example_input,))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise GraphError(
            f"torch.export cannot trace {type(module).__name__}: {reason[0]}"
        ) from error
    names = _input_names(exported, module)
    trace = Trace()
    tensors: dict[str, Value] = {}
    values: dict[fx.Node, Any] = {}
    leaves = {path for path, layer in module.named_modules() if not list(layer.children())}
    calls: dict[str, Call] = {}
    constants: list[Constant] = []
    output: Value | None = None
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            shape = _shape(node)
            name = names.get(node.name, "")
            if name and name in tensors:
                values[node] = tensors[name]
                continue
            labels = tuple(trace.fresh(size) if name else None for size in shape)
            values[node] = Value(shape, labels, name)
            if name:
                tensors[name] = values[node]
        elif node.op == "call_function":
            values[node] = _apply_rule(trace, node, values)
            constants += _constants(node, values)
            path, key = _module_of(node)
            if path in leaves and isinstance(values[node], Value):
                calls[key] = Call(path, values[node])
        elif node.op == "output":
            results = [values[a] for a in node.all_input_nodes if isinstance(values[a], Value)]
            for result in results:
                for row in result.labels:
                    trace.fix(row, "")
            output = results[-1] if results else None
    if output is None:
        raise GraphError(f"{type(module).__name__} returns no tensor.")
    size = example_input.shape[-1]
    return Program(trace, tensors, tuple(calls.values()), tuple(constants), output, size)


def _input_names(exported: torch.export.ExportedProgram, module: nn.Module) -> dict[str, str]:
    """placeholder name -> the parameter's or buffer's full name, the first one of a tied tensor."""
    tensors = named_tensors(module)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {
        spec.arg.name: first[id(tensors[spec.target])] if spec.target in tensors else spec.target
        for spec in exported.graph_signature.input_specs
        if spec.target is not None and hasattr(spec.arg, "name")
    }


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def _apply_rule(trace: Trace, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    mapped: Any = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    args, kwargs = mapped
    target = node.target
    if getattr(target, "__name__", "") == "getitem":
        return args[0][args[1]]
    value = node.meta.get("val")
    if value is None or not isinstance(value, (torch.Tensor, tuple, list)):
        return value
    name = _operator_name(node)
    rule = RULES.get(name)
    if rule is None:
        raise GraphError(f"No rule for the operator {name!r}, at {_where(node)}.")
    shapes: Any = (
        _shape(node)
        if isinstance(value, torch.Tensor)
        else [tuple(int(size) for size in part.shape) for part in value]
    )
    try:
        return rule(trace, shapes, *args, **kwargs)
    except GraphError as error:
        raise GraphError(f"{error} ({name!r}, at {_where(node)}).") from None
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise GraphError(
            f"The rule for {name!r} does not cover its use at {_where(node)}: {error}."
        ) from error


def _operator_name(node: fx.Node) -> str:
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


def _module_of(node: fx.Node) -> tuple[str, str]:
    """(path of the innermost module, key that tells its calls apart)."""
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).items())
    key, (path, *_) = stack[-1]
    return path, key


def _where(node: fx.Node) -> str:
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    source = next((line for line in reversed(frames) if line.startswith("File ")), "")
    path, _ = _module_of(node)
    return f"node {node.name!r} of module {path!r}" + (f", {source}" if source else "")


def _constants(node: fx.Node, values: dict[fx.Node, Any]) -> Iterator[Constant]:
    if _operator_name(node) not in _SHAPE_OPERATORS:
        return
    integers: list[int] = []
    for argument in (*node.args, *node.kwargs.values()):
        items = argument if isinstance(argument, (list, tuple)) else [argument]
        integers += [n for n in items if isinstance(n, int) and not isinstance(n, bool) and n > 1]
    tensors = [values[a] for a in node.all_input_nodes]
    tensors += values[node] if isinstance(values[node], tuple) else [values[node]]
    path, _ = _module_of(node)
    for value in tensors:
        if isinstance(value, Value):
            for row in value.labels:
                if row is not None and len(row) in integers:
                    yield Constant(path, _where(node), len(row), row)
