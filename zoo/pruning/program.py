"""A network as a program: traced with `torch.export`, interpreted with channel labels.

Networks that surgery cannot cut whatever a trace says (wrappers, computed weights, ...) are refused
first.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from zoo.errors import GraphError
from zoo.pruning.labels import Labels, Trace, Value, is_channels
from zoo.pruning.operators import RULES
from zoo.pruning.surgery import evaluating, named_tensors

__all__ = [
    "Program",
    "check_prunable",
    "export",
    "integers",
    "interpret",
    "locate",
    "module_path",
    "operator_name",
]

_SHAPE_OPERATORS = {"view", "reshape", "_unsafe_view", "unflatten", "expand", "split", "chunk"}
_SHAPE_OPERATORS |= {"split_with_sizes", "slice", "narrow", "repeat", "layer_norm", "rms_norm"}
_SHAPE_OPERATORS |= {"constant_pad_nd", "pad"}


@dataclass(frozen=True)
class Call:
    """One call of a leaf module: its path, and the labels and shape of what it returns."""

    path: str
    value: Value


@dataclass(frozen=True)
class Constant:
    """A row of channels that an operator is told the length of, by a constant or by a shape.

    Attributes:
        path: of the module whose `forward` has the operator.
        where: node, module and source line.
        value: the length.
        labels: the row.
        place: of the number within its argument, `.0`, `.1`, ... or `before` and `after`, or "".
        literal: whether the number stands among the operator's arguments.
    """

    path: str
    where: str
    value: int
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
        idle: parameters and buffers that nothing is computed from in eval mode.
        calls: of leaf modules, in order.
        constants: integers in operators that may be hidden widths.
        flows: module -> (what flows into its first call, what flows out of its last).
        output: of the network.
        image_size: pixels per side.
    """

    exported: torch.export.ExportedProgram
    trace: Trace
    values: dict[fx.Node, Any]
    tensors: dict[str, Value]
    idle: tuple[str, ...]
    calls: tuple[Call, ...]
    constants: tuple[Constant, ...]
    flows: dict[str, tuple[Value, Value]]
    output: Value
    image_size: int


def interpret(module: nn.Module, example_input: Tensor) -> Program:
    """Trace `module` in eval mode and pass channel labels through every operator.

    Raises:
        GraphError: if the network cannot be traced, or an operator has no rule.
    """
    check_prunable(module)
    exported = export(module, example_input)
    names = _input_names(exported, module)
    trace = Trace(example_input.shape[0])
    tensors: dict[str, Value] = {}
    values: dict[fx.Node, Any] = {}
    leaves = {path for path, layer in module.named_modules() if not list(layer.children())}
    kernels = {f"{n}.weight" for n, layer in module.named_modules() if isinstance(layer, _ConvNd)}
    calls: dict[str, Call] = {}
    constants: list[Constant] = []
    output: Value | None = None
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name)
            if name is None:  # the images, or a constant
                values[node] = _without_channels(trace, _shape(node))
                continue
            if name not in tensors:
                tensors[name] = _stored(trace, name, _shape(node), name in kernels)
            values[node] = tensors[name]
        elif node.op == "call_function":
            values[node] = _apply_rule(trace, node, values)
            constants += _constants(node, values)
            path, key = _module_of(node)
            if path in leaves and isinstance(values[node], Value):
                calls[key] = Call(path, values[node])
        elif node.op == "get_attr":  # the graph of a region that was put in its place
            values[node] = None
        elif node.op == "output":
            results = [values[a] for a in node.all_input_nodes if isinstance(values[a], Value)]
            for result in results:
                for row in result.labels:
                    trace.fix(row, "")
            output = results[-1] if results else None
    if output is None:
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
        output=output,
        image_size=example_input.shape[-1],
    )


def _stored(trace: Trace, name: str, shape: tuple[int, ...], is_kernel: bool) -> Value:
    """A parameter or buffer: any dimension may hold channels, of a kernel the first two."""
    channels = 2 if is_kernel else len(shape)
    rows = (trace.fresh(n, name, d) if d < channels else None for d, n in enumerate(shape))
    return Value(shape, tuple(rows), name)


def export(module: nn.Module, example_input: Tensor) -> torch.export.ExportedProgram:
    """The ATen program of `module` in eval mode.

    Raises:
        GraphError: with the reason that torch gives, and the line of the module's own code that it
            fails in, if it cannot be traced.
    """
    try:
        with evaluating(module), _quiet():
            exported = torch.export.export(module, (example_input,))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise GraphError(
            f"torch.export cannot trace {type(module).__name__}: {reason[0]}{_failing_line(error)}"
        ) from error
    _inline_regions(exported.graph_module)
    return exported


_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the graphs that torch logs and prints of what it cannot trace; the error is raised.

    One thread at a time, because the log and standard error are the whole process's.
    """
    with _ONE_AT_A_TIME, contextlib.redirect_stderr(io.StringIO()):
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _failing_line(error: BaseException) -> str:
    """Where `error` left the user's code for torch's, and what stands there; "" where unknown."""
    others = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    standard = sysconfig.get_path("stdlib")
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(others)
        and ("site-packages" in frame.filename or not frame.filename.startswith(standard))
    ]
    return f" ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""


def _inline_regions(program: fx.GraphModule) -> None:
    """Put what runs with autocast switched, which is a graph of its own, in its place."""
    for region in list(program.graph.nodes):
        if getattr(region.target, "__name__", "") != "wrap_with_autocast":
            continue
        at = next(n for n, a in enumerate(region.args) if getattr(a, "op", "") == "get_attr")
        inner = getattr(program, region.args[at].target)
        given = [node for node in inner.graph.nodes if node.op == "placeholder"]
        copies = dict(zip(given, region.args[at + 1 :], strict=True))
        with program.graph.inserting_before(region):
            results: Any = program.graph.graph_copy(inner.graph, copies)
        for part in list(region.users):  # a region gives a tuple
            part.replace_all_uses_with(results[part.args[1]])
            program.graph.erase_node(part)
        program.graph.erase_node(region)


def check_prunable(module: nn.Module) -> None:
    """Refuse networks that are not, or not only, made of modules and their own parameters.

    Raises:
        GraphError: naming the module, and what to prune instead.
    """
    for path, layer in module.named_modules():
        for applies, reason in _REFUSED:
            if applies(layer):
                name = f"The {type(layer).__name__} {path!r}" if path else type(layer).__name__
                raise GraphError(f"{name} {reason}.")


def _is_computed(layer: nn.Module) -> bool:
    """Whether torch computes a parameter of the layer from others before each call."""
    computing: list[Any] = list(layer._forward_pre_hooks.values())
    if parametrize.is_parametrized(layer):
        for steps in layer.parametrizations.values():  # type: ignore[union-attr, operator]
            computing += steps
    return any(type(step).__module__.startswith("torch.nn.utils.") for step in computing)


_REFUSED: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (
        lambda layer: isinstance(getattr(layer, "_orig_mod", None), nn.Module),
        "is compiled: prune the network inside (its _orig_mod), then compile that",
    ),
    (
        lambda layer: isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel),
        "is a wrapper: prune the network inside (its module), then wrap that",
    ),
    (
        lambda layer: isinstance(layer, torch.jit.ScriptModule),
        "is TorchScript: prune the network that it was made from",
    ),
    (
        lambda layer: "quantized" in type(layer).__module__,
        "is quantised: prune the floating-point network, then quantise that",
    ),
    (
        lambda layer: isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params(),
        "has no parameters yet: run the network once",
    ),
    (
        _is_computed,
        "computes its weight from other tensors (weight_norm, spectral_norm or a pruning mask): "
        "make it permanent first, with torch.nn.utils.parametrize.remove_parametrizations, "
        "remove_weight_norm, remove_spectral_norm or prune.remove",
    ),
)
"""What applies to a module that cannot be pruned -> what to say of it."""


def _input_names(exported: torch.export.ExportedProgram, module: nn.Module) -> dict[str, str]:
    """placeholder name -> the parameter's or buffer's full name, the first one of a tied tensor."""
    tensors = named_tensors(module)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {
        spec.arg.name: first[id(tensors[spec.target])]
        for spec in exported.graph_signature.input_specs
        if spec.target in tensors and hasattr(spec.arg, "name")
    }


def _flows(values: dict[fx.Node, Any]) -> dict[str, tuple[Value, Value]]:
    """module -> (what flows into its first call, what flows out of its last)."""
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
    target = node.target
    if getattr(target, "__name__", "") == "getitem":
        part = args[0][args[1]]
        if part is None and node.users:
            raise GraphError(f"Positions of channels are used as numbers, at {locate(node)}.")
        return part
    value = node.meta.get("val")
    if value is None or not isinstance(value, (torch.Tensor, tuple, list)):
        return value
    name = operator_name(node)
    rule = RULES.get(name)
    if rule is None and not any(_has_channels(values[a]) for a in node.all_input_nodes):
        rule = _without_channels
    if rule is None:
        raise GraphError(f"No rule for the operator {name!r}, at {locate(node)}.")
    shapes: Any = (
        _shape(node)
        if isinstance(value, torch.Tensor)
        else [tuple(int(size) for size in part.shape) for part in value]
    )
    try:
        return rule(trace, shapes, *args, **kwargs)
    except GraphError as error:
        raise GraphError(f"{error} ({name!r}, at {locate(node)}).") from None
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise GraphError(
            f"The rule for {name!r} does not cover its use at {locate(node)}: {error}."
        ) from error


def _has_channels(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list) else [value]
    return any(is_channels(row) for v in parts if isinstance(v, Value) for row in v.labels)


def _without_channels(_: Trace, shapes: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator on tensors that no channel lives in: constants, positions, masks."""
    del args, kwargs
    if isinstance(shapes, list):
        return tuple(Value(shape, (None,) * len(shape)) for shape in shapes)
    return Value(shapes, (None,) * len(shapes))


def operator_name(node: fx.Node) -> str:
    """The name of the node's ATen operator, without its overload."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


def _module_of(node: fx.Node) -> tuple[str, str]:
    """(path of the innermost module, key that tells its calls apart)."""
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).items())
    key, (path, *_) = stack[-1]
    return path, key


def module_path(node: fx.Node) -> str:
    """Of the innermost module whose `forward` has the node."""
    return _module_of(node)[0]


def locate(node: fx.Node) -> str:
    """Where a node comes from: its name, module and source line."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    line = next((line for line in reversed(frames) if line.startswith("File ")), "")
    return f"node {node.name!r} of module {module_path(node)!r}" + (f", {line}" if line else "")


def _constants(node: fx.Node, values: dict[fx.Node, Any]) -> Iterator[Constant]:
    """The channel rows that a shape operator splits, slices, pads or reshapes by."""
    name = operator_name(node)
    if name not in _SHAPE_OPERATORS:
        return
    stated = set(integers((*node.args, *node.kwargs.values())))
    for row, place in _shaped_rows(name, node, values):
        if is_channels(row):
            yield Constant(
                module_path(node), locate(node), len(row), row, place, len(row) in stated
            )


def integers(arguments: Iterable[Any]) -> Iterator[int]:
    """The integers but for 0, without their signs, in arguments and lists of them."""
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from integers(argument)
        elif isinstance(argument, int) and not isinstance(argument, bool) and argument:
            yield abs(argument)


def _shaped_rows(
    name: str, node: fx.Node, values: dict[fx.Node, Any]
) -> Iterator[tuple[Labels, str]]:
    """(row, place): `place` tells the numbers of one argument apart, as in `Constant`."""
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
    elif name == "split_with_sizes":
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        yield given.labels[dim], ""
        for n, part in enumerate(result):
            yield part.labels[dim], f".{n}"
    else:
        parts = result if isinstance(result, tuple) else (result,)
        for value in (given, *parts):
            yield from ((row, "") for row in value.labels)
