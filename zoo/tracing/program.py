"""Traced programs, interpreted with channel labels in place of numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from zoo.errors import GraphError
from zoo.spec.groups import InputShape
from zoo.surgery.surgery import named_tensors
from zoo.tracing.calls import (
    Inputs,
    batch_of,
    image_channels,
    shapes_of,
    tensors_of,
)
from zoo.tracing.exporting import export
from zoo.tracing.labels import Labels, Trace, Value, is_channels, rows_of
from zoo.tracing.macs import is_per_item, macs_of
from zoo.tracing.operators import RULES, pointwise
from zoo.tracing.refusals import check_prunable

__all__ = [
    "SHAPE_OPERATORS",
    "Program",
    "integers",
    "interpret",
    "locate",
    "module_path",
    "operator_name",
]

SHAPE_OPERATORS = {"view", "reshape", "_unsafe_view", "unflatten", "expand", "split", "chunk"}
SHAPE_OPERATORS |= {"split_with_sizes", "slice", "narrow", "repeat", "layer_norm", "rms_norm"}
SHAPE_OPERATORS |= {"constant_pad_nd", "pad"}


@dataclass(frozen=True)
class Call:
    """One call of a leaf module: its path, and its output as an abstract tensor."""

    path: str
    value: Value


@dataclass(frozen=True)
class Constant:
    """A row of channels whose length may be an integer argument of a shape operator.

    Attributes:
        path: the module whose `forward` calls the operator.
        where: node, module and source line.
        labels: the row.
        place: which item of the argument it is: `.0`, `.1`, ..., `before`, `after`, or "".
        literal: whether the length is among the operator's arguments.
    """

    path: str
    where: str
    labels: Labels
    place: str
    literal: bool


@dataclass(frozen=True)
class Program:
    """A traced and interpreted network.

    Attributes:
        exported: the ATen program.
        trace: its labels.
        values: node -> its abstract tensor, or a tuple of them.
        tensors: parameter or buffer -> its abstract tensor.
        idle: parameters and buffers that eval mode does not use.
        calls: calls of leaf modules, in order.
        constants: rows whose length may be a constant in `forward`.
        flows: module -> (input of its first call, output of its last call).
        outputs: outputs of the network, in the order of `leaves`.
        image_size, inputs: as in `ChannelGroups`.
    """

    exported: torch.export.ExportedProgram
    trace: Trace
    values: dict[fx.Node, Any]
    tensors: dict[str, Value]
    idle: tuple[str, ...]
    calls: tuple[Call, ...]
    constants: tuple[Constant, ...]
    flows: dict[str, tuple[Value, Value]]
    outputs: tuple[Value, ...]
    image_size: int
    inputs: tuple[InputShape, ...]


def interpret(module: nn.Module, inputs: Inputs) -> Program:
    """Trace `module` in eval mode and pass channel labels through every operator.

    Channels that enter an operator without a rule are fixed, so that its input shapes never change.

    Raises:
        GraphError: if the network cannot be traced, or returns no tensor.
    """
    check_prunable(module)
    exported = export(module, inputs)
    names = _input_names(exported, module)
    trace = Trace(batch_of(inputs))
    tensors: dict[str, Value] = {}
    values: dict[fx.Node, Any] = {}
    leaves = {path for path, layer in module.named_modules() if _is_leaf(layer)}
    kernels = {f"{n}.weight" for n, layer in module.named_modules() if isinstance(layer, _ConvNd)}
    calls: dict[str, Call] = {}
    constants: list[Constant] = []
    outputs: tuple[Value, ...] = ()
    per_item = _batched_inputs(exported, inputs)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name)
            if name is None:  # an input, or a constant
                values[node] = _without_channels(_shape(node))
                continue
            if name not in tensors:
                tensors[name] = _stored(trace, name, _shape(node), name in kernels)
            values[node] = tensors[name]
        elif node.op == "call_function":
            trace.where = locate(node)
            trace.per_item = is_per_item(node, trace.batch, per_item)
            if trace.per_item:
                per_item.add(node)
            values[node] = _apply_rule(trace, node, values)
            trace.where = ""
            constants += _constants(node, values)
            path, key = _module_of(node)
            if path in leaves and isinstance(values[node], Value):
                calls[key] = Call(path, values[node])
        elif node.op == "get_attr":  # the subgraph of a region, which `export` has inlined
            values[node] = None
        elif node.op == "output":
            results: Any = fx.map_arg(node.args[0], values.__getitem__)
            outputs = tuple(value for value in results if isinstance(value, Value))
            for row in rows_of(outputs):
                trace.fix(row, "")
    if not outputs:
        raise GraphError(f"{type(module).__name__} returns no tensor.")
    return Program(
        exported=exported,
        trace=trace,
        values=values,
        tensors=tensors,
        idle=tuple(v.name for n, v in values.items() if n.op == "placeholder" and not n.users),
        calls=tuple(calls.values()),
        constants=tuple(constants),
        flows=_flows(values),
        outputs=outputs,
        image_size=next(iter(tensors_of(inputs)[0].shape[::-1]), 1),
        inputs=() if _are_square_images(module, inputs) else shapes_of(inputs),
    )


def _is_leaf(layer: nn.Module) -> bool:
    """Whether a layer has a `forward` and no children; without one it only holds tensors."""
    return not list(layer.children()) and type(layer).forward is not nn.Module.forward


def _stored(trace: Trace, name: str, shape: tuple[int, ...], is_kernel: bool) -> Value:
    """A parameter or buffer with fresh labels in every dimension; of a kernel, in the first two."""
    trace.elements[name] = math.prod(shape)
    channels = 2 if is_kernel else len(shape)
    rows = (trace.fresh(n, name, d) if d < channels else None for d, n in enumerate(shape))
    return Value(shape, tuple(rows), name)


def _are_square_images(module: nn.Module, inputs: Inputs) -> bool:
    """Whether `input_shapes` can make inputs like these from the image size alone."""
    (first, *others) = tensors_of(inputs)
    if isinstance(inputs, Mapping) or others or first.ndim != 4 or first.dtype != torch.float32:
        return False
    _, channels, height, width = first.shape
    return height == width and channels == image_channels(module)


def _input_names(exported: torch.export.ExportedProgram, module: nn.Module) -> dict[str, str]:
    """Placeholder -> full name of the parameter or buffer; of tied tensors, the first name."""
    tensors = named_tensors(module)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {
        spec.arg.name: first[id(tensors[spec.target])]
        for spec in exported.graph_signature.input_specs
        if spec.target in tensors and hasattr(spec.arg, "name")
    }


def _batched_inputs(exported: torch.export.ExportedProgram, inputs: Inputs) -> set[fx.Node]:
    """The inputs with a batch: those as long as the first one."""
    given = {*exported.graph_signature.user_inputs}
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in given]
    return {n for n in nodes if _shape(n)[:1] == tensors_of(inputs)[0].shape[:1]}


def _flows(values: dict[fx.Node, Any]) -> dict[str, tuple[Value, Value]]:
    """Module -> (input of its first call, output of its last call)."""
    into: dict[str, Value] = {}
    out: dict[str, Value] = {}
    for node, value in values.items():
        if node.op != "call_function" or not isinstance(value, Value):
            continue
        sources = [values[a] for a in node.all_input_nodes]
        source = next((v for v in sources if isinstance(v, Value) and not v.name), None)
        for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
            if source is not None:
                into.setdefault(path, source)
            out[path] = value
    return {path: (into[path], out[path]) for path in into}


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def _apply_rule(trace: Trace, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    mapped: Any = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    args, kwargs = mapped
    name = operator_name(node)
    if name == "getitem":
        part = args[0][args[1]]
        if part is None and node.users:
            part = _fix_inputs(trace, node, values, "is searched for a position (max, min)")
        return part
    value = node.meta.get("val")
    if value is None or not isinstance(value, (torch.Tensor, tuple, list)):
        if value is None and not name.startswith(_ASSERTING):
            reason = f"enters the operator {name!r}, which returns no tensor"
            _fix_inputs(trace, node, values, reason)
        return value
    rule = RULES.get(name)
    if rule is None and isinstance(value, torch.Tensor) and _is_pointwise(node.target):
        rule = pointwise
    if rule is None:
        reason = f"enters the operator {name!r}, which has no rule"
        return _fix_counted(trace, node, values, reason)
    try:
        return rule(trace, _shapes(node), *args, **kwargs)
    except GraphError as error:
        return _fix_counted(trace, node, values, f"enters {error} ({name!r})")
    except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        reason = f"enters the operator {name!r}, whose rule does not cover its use ({error})"
        return _fix_counted(trace, node, values, reason)


def _is_pointwise(target: Any) -> bool:
    """Whether torch tags the operator as elementwise."""
    return torch.Tag.pointwise in getattr(target, "tags", ())


_ASSERTING = ("_assert", "sym_constrain")
"""Prefixes of the names of operators that return nothing and change nothing."""


def _fix_counted(trace: Trace, node: fx.Node, values: dict[fx.Node, Any], reason: str) -> Any:
    """As `_fix_inputs`; the MACs, which no plan changes then, are counted if they are known."""
    macs = macs_of(node)
    if macs is None:
        reason += ", and whose MACs are not counted"
    trace.add_macs(macs or 0)
    return _fix_inputs(trace, node, values, reason)


def _fix_inputs(trace: Trace, node: fx.Node, values: dict[fx.Node, Any], reason: str) -> Any:
    """Fix all inputs of a node, and return outputs without labels."""
    for source in node.all_input_nodes:
        if node.target is operator.getitem:  # the input is a tuple: fix what it was computed from
            _fix_inputs(trace, source, values, reason)
        for row in rows_of(values.get(source)):
            if is_channels(row):
                trace.fix(row, reason)
    return _without_channels(_shapes(node))


def _shapes(node: fx.Node) -> Any:
    """The shape of a node's tensor, or a list of shapes if it has several."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return [tuple(map(int, part.shape)) if hasattr(part, "shape") else () for part in value]
    return _shape(node)


def _without_channels(shapes: Any) -> Any:
    """Abstract tensors without channels: constants, positions, masks."""
    if isinstance(shapes, list):
        return tuple(Value(shape, (None,) * len(shape)) for shape in shapes)
    return Value(shapes, (None,) * len(shapes))


def operator_name(node: fx.Node) -> str:
    """The name of the node's ATen operator, without its overload."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


def _module_of(node: fx.Node) -> tuple[str, str]:
    """(path of the innermost module, key that is unique for each of its calls)."""
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).items())
    key, (path, *_) = stack[-1]
    return path, key


def module_path(node: fx.Node) -> str:
    """The path of the innermost module whose `forward` has the node."""
    return _module_of(node)[0]


def locate(node: fx.Node) -> str:
    """Where a node comes from: its name, module and source line."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    line = next((line for line in reversed(frames) if line.startswith("File ")), "")
    return f"node {node.name!r} of module {module_path(node)!r}" + (f", {line}" if line else "")


def _constants(node: fx.Node, values: dict[fx.Node, Any]) -> Iterator[Constant]:
    """The rows whose lengths a shape operator splits, slices, pads or reshapes by."""
    name = operator_name(node)
    if name not in SHAPE_OPERATORS:
        return
    stated = set(integers((*node.args, *node.kwargs.values())))
    for row, place in _shaped_rows(name, node, values):
        if is_channels(row):
            yield Constant(module_path(node), locate(node), row, place, len(row) in stated)


def integers(arguments: Iterable[Any]) -> Iterator[int]:
    """The absolute values of all integers except 0 in nested arguments."""
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from integers(argument)
        elif isinstance(argument, int) and not isinstance(argument, bool) and argument:
            yield abs(argument)


def _shaped_rows(
    name: str, node: fx.Node, values: dict[fx.Node, Any]
) -> Iterator[tuple[Labels, str]]:
    """(row, place) for each row that the operator may state the length of, as in `Constant`."""
    given, result = values[node.all_input_nodes[0]], values[node]
    if name in ("pad", "constant_pad_nd"):
        for n, width in enumerate(node.args[1]):  # type: ignore[arg-type]
            row = result.labels[len(result.shape) - 1 - n // 2]
            if width and is_channels(row):
                yield (row[:width], "before") if n % 2 == 0 else (row[-width:], "after")
    elif name == "slice":
        row = given.labels[node.args[1] if len(node.args) > 1 else 0]
        for bound in node.args[2:4]:
            if is_channels(row) and isinstance(bound, int) and 0 < abs(bound) < len(row):
                yield row[:bound] if bound > 0 else row[bound:], ""
    elif name == "narrow":
        numbers: Any = node.args[1:4]
        dim, start, length = numbers
        row = given.labels[dim]
        if is_channels(row) and isinstance(start, int) and start >= 0:
            at = [size > 0 for size in (dim, start)]  # which of them are among the lengths
            if start:
                yield row[:start], f".{sum(at[:1])}"
            yield row[start : start + length], f".{sum(at)}"
    elif name == "split_with_sizes":
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        yield given.labels[dim], ""
        for n, part in enumerate(result):
            yield part.labels[dim], f".{n}"
    else:
        parts = result if isinstance(result, tuple) else (result,)
        for value in (given, *parts):
            yield from ((row, "") for row in value.labels)
