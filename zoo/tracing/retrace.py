"""Compares the trace of a pruned network with the dense one, operator by operator.

A width can be a number in a computation: the bound of a slice, the groups of a shuffle or of a
normalisation, a scale of 1 / sqrt(C). Surgery changes the number with the width, so the pruned
network may compute another function although all shapes are right.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from zoo.surgery.surgery import is_repaired
from zoo.tracing.calls import Inputs, call
from zoo.tracing.exporting import export
from zoo.tracing.labels import Labels, Value, is_channels, parts_of, rows_of
from zoo.tracing.program import SHAPE_OPERATORS, Program, locate, module_path, operator_name

__all__ = [
    "Failure",
    "agree",
    "first_change",
    "numbers_in",
    "predicted",
    "shown",
    "slices_channels",
]


@dataclass(frozen=True)
class Failure:
    """Where a trial surgery failed: the module's path, and what was observed.

    `row` are the channels to keep whole because of it, `where` the node, and `reason` why, if these
    are known. `before` are the layers called until then, each with a row of its output.
    """

    path: str
    message: str
    row: Labels | None = None
    where: str = ""
    reason: str = "is a constant"
    before: tuple[tuple[str, Labels | None], ...] = ()


# --- shapes ---------------------------------------------------------------------------------------


def predicted(program: Program, value: Value, removed: set[int]) -> tuple[int | None, ...]:
    """The shape of `value` without the channels whose labels are in `removed`.

    A size is None where all positions are equal, as after `expand`: it adapts to its consumer.
    """
    find = program.trace.find

    def length(size: int, row: Labels | None) -> int | None:
        if row is None:
            return size
        return sum(find(label) not in removed for label in row.tolist()) if len(row) else None

    return tuple(map(length, value.shape, value.labels))


def shown(expected: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in expected)})"


def agree(got: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether `got` equals `expected`, in which None matches any size."""
    return len(got) == len(expected) and all(
        size in (None, own) for own, size in zip(got, expected, strict=True)
    )


# --- numbers --------------------------------------------------------------------------------------


def numbers_in(network: nn.Module, inputs: Inputs) -> list[tuple[str, list[float]]]:
    """The torch functions that `network` calls, in order, with their numeric arguments.

    Layers in `REPAIRS` are left out: surgery corrects their numbers.
    """
    recorder = _Recorder()
    hooks = []
    for layer in network.modules():
        if type(layer).__module__.startswith("torch.nn.") and is_repaired(layer):
            hooks.append(layer.register_forward_pre_hook(recorder.mute))
            hooks.append(layer.register_forward_hook(recorder.unmute))
    try:
        with torch.no_grad(), recorder:
            call(network, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.calls


class _Recorder(TorchFunctionMode):
    """Records the torch functions that are called outside muted layers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[float]]] = []
        self._muted = 0  # number of running muted layers: one may call another

    def mute(self, *_: Any) -> None:
        self._muted += 1

    def unmute(self, *_: Any) -> None:
        self._muted -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        name = getattr(func, "__name__", str(func))
        if not self._muted and name not in _READS:
            self.calls.append((name, list(_numbers((args, kwargs or {})))))
        return func(*args, **(kwargs or {}))


_READS = ("__get__", "size", "dim", "numel", "__len__", "stride")
"""Functions that only read a property of a tensor."""


def _numbers(value: Any) -> Iterator[float]:
    """The integers and floats in nested arguments, in order."""
    if isinstance(value, dict):
        value = tuple(value.values())
    elif isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, tuple | list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, Real) and not isinstance(value, bool):  # NumPy's too
        plain = value if isinstance(value, int) else float(value)
        yield plain if plain == plain else math.nan  # one NaN object: equal lists compare equal


# --- the trace ------------------------------------------------------------------------------------


def first_change(
    program: Program, pruned: nn.Module, inputs: Inputs, removed: set[int]
) -> Failure | None:
    """The first operator of `pruned` that differs from the dense one on the kept channels.

    Args:
        program: the interpreted program of the dense network.
        pruned: the network after surgery.
        inputs: those the dense network was traced with.
        removed: the representatives of the labels that the plan removes.
    """
    traced = export(pruned, inputs)
    failure = _constant_failure(program, traced)
    if failure is not None:
        return failure
    dense, fewer = (list(_operators(p)) for p in (program.exported, traced))
    for old, new in zip(dense, fewer, strict=False):
        name = operator_name(old)
        if name != operator_name(new):
            return _failure(program, old, "decides what is computed")
        if name in ("slice", "narrow"):
            failure = _slice_failure(program, old, new, removed)
            if failure is not None:
                return failure
        if name in ("pad", "constant_pad_nd"):
            failure = _padding_failure(program, old, new, removed)
            if failure is not None:
                return failure
        pairs = zip(parts_of(program.values[old]), parts_of(new.meta.get("val")), strict=False)
        for value, got in pairs:
            if isinstance(value, Value) and isinstance(got, Tensor):
                expected = predicted(program, value, removed)
                if not agree(tuple(map(int, got.shape)), expected):
                    return _failure(program, old, "is divided into parts")
        if _fixed_numbers(old, old) != _fixed_numbers(new, old):
            return _failure(program, old, "is used as a number")
    if len(dense) != len(fewer):
        return _failure(program, dense[-1], "decides what is computed")
    return None


def _constant_failure(program: Program, traced: torch.export.ExportedProgram) -> Failure | None:
    """A failure for a number stored as a tensor, as `torch.tensor(x.shape[1])`, that changed."""
    after = traced.constants
    changed = {
        name
        for name, old in program.exported.constants.items()
        if isinstance(old, Tensor) and isinstance(new := after.get(name), Tensor)
        if old.shape == new.shape and not torch.equal(old.to(new), new)
    }
    specs = program.exported.graph_signature.input_specs
    givers = {spec.arg.name for spec in specs if spec.target in changed}
    for node in program.exported.graph.nodes:
        if node.op == "call_function" and any(n.name in givers for n in node.all_input_nodes):
            return _failure(program, node, "is used as a number")
    return None


def _operators(program: torch.export.ExportedProgram) -> Iterator[fx.Node]:
    return (node for node in program.graph.nodes if node.op == "call_function")


def _fixed_numbers(node: fx.Node, dense: fx.Node) -> list[float]:
    """The numeric arguments of an operator that surgery must not change.

    Left out are lengths, which the shapes show, and the groups of a depthwise convolution, which
    are its channels.
    """
    name, args = operator_name(dense), _arguments(node)
    if name in SHAPE_OPERATORS:
        return [number for number in _numbers((args, node.kwargs)) if isinstance(number, float)]
    weight: Any = dense.args[1] if name.startswith("conv") else None
    if weight is not None and len(args) > GROUPS and weight.meta["val"].shape[1] == 1:
        del args[GROUPS]
    return list(_numbers((args, node.kwargs)))


def _arguments(node: fx.Node) -> list[Any]:
    """The positional arguments with their defaults, which programs leave out: groups of 1, say."""
    args, target = list(node.args), node.target
    if isinstance(target, torch._ops.OpOverload):
        later = target._schema.arguments[len(args) :]
        args += [a.default_value for a in later if not a.kwarg_only and a.name not in node.kwargs]
    return args


GROUPS = 6
"""The position of the number of groups among the arguments of every convolution."""


def _failure(program: Program, node: fx.Node, reason: str) -> Failure:
    """A failure at a node, with the last row of channels up to it that is not fixed yet."""
    find, fixed = program.trace.find, program.trace.fixed_roots()
    nodes = list(program.exported.graph.nodes)
    path, where = module_path(node), locate(node)
    for earlier in reversed(nodes[: nodes.index(node) + 1]):
        if earlier.op != "call_function":
            continue
        for row in rows_of(program.values.get(earlier)):
            if is_channels(row) and not fixed.issuperset(map(find, row.tolist())):
                return Failure(path, f"its width {reason}", row, where, reason)
    return Failure(path, f"a width {reason}", where=where)


# --- slices ---------------------------------------------------------------------------------------


def slices_channels(program: Program) -> bool:
    """Whether some operator slices channels by their positions."""
    return any(
        operator_name(node) in ("slice", "narrow") and _cuts_channels(program, node)
        for node in _operators(program.exported)
    )


def _slice_failure(
    program: Program, old: fx.Node, new: fx.Node, removed: set[int]
) -> Failure | None:
    """A failure for a slice whose bounds did not move with its channels.

    Two such slices can leave all later shapes right, as when two halves are swapped. If the
    channels stay whole already, the bounds follow the width of others.
    """
    row = _sliced_row(program, old)
    if row is None or not _cuts_channels(program, old):
        return None
    stays = [program.trace.find(label) not in removed for label in row.tolist()]
    step: Any = old.args[4] if len(old.args) > 4 else 1  # the channels of one step are one unit
    for bound, got in zip(_bounds(old), _bounds(new), strict=True):
        within = bound % step
        at = bound - within
        moved = sum(stays[:at]) if bound >= 0 else -sum(stays[at:])
        if abs(bound) < len(row) and got != moved + within:
            cut = row if got != bound else row[:bound] if bound > 0 else row[bound:]
            if program.trace.fixed_roots().issuperset(map(program.trace.find, cut.tolist())):
                return _failure(program, old, "decides where channels are sliced")
            return Failure(module_path(old), "its channels are sliced", cut, locate(old))
    return None


def _padding_failure(
    program: Program, old: fx.Node, new: fx.Node, removed: set[int]
) -> Failure | None:
    """A failure for padding by other widths than are kept, even if their sum is right."""
    result = program.values[old]
    widths: Any = (old.args[1], new.args[1])
    for n, (width, got) in enumerate(zip(*widths, strict=True)):
        row = result.labels[len(result.shape) - 1 - n // 2]
        if width <= 0 or not is_channels(row):
            continue
        padded = row[:width] if n % 2 == 0 else row[-width:]
        if got != sum(program.trace.find(label) not in removed for label in padded.tolist()):
            reason = "is padded by numbers that other widths decide"
            return Failure(module_path(old), f"its width {reason}", row, locate(old), reason)
    return None


def _sliced_row(program: Program, node: fx.Node) -> Labels | None:
    given, dim, *_ = (*node.args, 0)
    return program.values[given].labels[dim]  # type: ignore[index]


def _cuts_channels(program: Program, node: fx.Node) -> bool:
    row = _sliced_row(program, node)
    return is_channels(row) and any(bound and abs(bound) < len(row) for bound in _bounds(node))


def _bounds(node: fx.Node) -> tuple[int, int]:
    start, end = (*node.args[2:4], None, None)[:2]
    if operator_name(node) == "narrow":
        return start, start + end  # type: ignore[return-value, operator]
    return start or 0, sys.maxsize if end is None else end  # type: ignore[return-value]
