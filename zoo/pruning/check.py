"""The check of channel groups: a trial surgery, and what it shows that no label could.

Under fake tensors every layer's output shape is compared with the predicted one; a second trace
compares the bounds of slices of channels, which can be wrong in the right shape; and parts that
only training uses are run in training mode.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from zoo.calls import Inputs, call, leaves, mapped
from zoo.cost import Cost
from zoo.errors import GraphError
from zoo.groups import ChannelGroups
from zoo.pruning.labels import Labels, Value, is_channels
from zoo.pruning.plan import Plan, attribute_values
from zoo.pruning.program import Program, locate, module_path, operator_name
from zoo.pruning.surgery import apply, named_tensors, resized
from zoo.pruning.tracing import export

__all__ = ["Failure", "first_failure", "removed_roots"]


@dataclass(frozen=True)
class Failure:
    """Where a trial surgery went wrong: the module's path, and what was seen.

    `row` are the channels to keep whole for it, and `where` the node, if that much is known.
    """

    path: str
    message: str
    row: Labels | None = None
    where: str = ""


def first_failure(
    module: nn.Module, groups: ChannelGroups, program: Program, inputs: Inputs
) -> Failure | None:
    """What goes wrong when `module` is cut by a trial plan; None if nothing does.

    Args:
        module: the dense network.
        groups: its groups.
        program: its interpretation.
        inputs: as it was traced with.

    Raises:
        GraphError: if a part that has no share in eval mode would break in training mode.
    """
    failure = _check_shapes(module, groups, program, inputs)
    if failure is None:
        failure = _check_slices(module, groups, program, inputs)
    if failure is None:
        _check_training(module, groups, program, inputs)
    return failure


def _check_shapes(
    module: nn.Module, groups: ChannelGroups, program: Program, inputs: Inputs
) -> Failure | None:
    """The first layer whose output shape, under fake tensors, is not as predicted."""
    plan = _trial_plan(groups)
    removed = removed_roots(program, groups, plan)
    with _faked(module) as (mode, fake):
        pruned = apply(fake, groups, plan).eval()
        seen: list[tuple[str, tuple[int, ...] | None]] = []
        active: list[str] = []
        with _watched(pruned, seen, active):
            try:
                result = call(pruned, mapped(mode.from_tensor, inputs))
            except Exception as error:
                where = active[-1] if active else ""
                return Failure(where, (str(error).strip().splitlines() or [""])[0])
    by_path: dict[str, list[tuple[int, ...] | None]] = defaultdict(list)
    for path, shape in seen:
        by_path[path].append(shape)
    taken: Counter[str] = Counter()
    for made in program.calls:
        shapes = by_path.get(made.path, [])
        if taken[made.path] >= len(shapes):
            return Failure(made.path, "was called less often than in the traced program")
        got, expected = shapes[taken[made.path]], _predicted(program, made.value, removed)
        taken[made.path] += 1
        if got is not None and not _agree(got, expected):
            return Failure(made.path, f"gives shape {got}, expected {_shown(expected)}")
    outputs = leaves(result)
    if len(outputs) != len(program.outputs):
        return Failure("", f"gives {len(outputs)} tensors, expected {len(program.outputs)}")
    for output, value in zip(outputs, program.outputs, strict=True):
        expected = _predicted(program, value, removed)
        if not _agree(tuple(output.shape), expected):
            return Failure("", f"gives shape {tuple(output.shape)}, expected {_shown(expected)}")
    return None


def _agree(got: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether the shapes are the same where a size is expected at all."""
    return len(got) == len(expected) and all(
        size in (None, own) for own, size in zip(got, expected, strict=True)
    )


def _check_training(
    module: nn.Module, groups: ChannelGroups, program: Program, inputs: Inputs
) -> None:
    """Refuse what only training runs, and surgery would break, as an auxiliary classifier."""
    idle = [name for name, _ in module.named_parameters() if name in program.idle]
    if not idle:
        return
    with _faked(module) as (mode, fake):
        pair = mapped(lambda tensor: torch.cat([mode.from_tensor(tensor)] * 2), inputs)
        for network in (fake, apply(fake, groups, _trial_plan(groups))):
            try:
                call(network.train(), pair)
            except Exception as error:
                if network is fake:
                    return  # it cannot be trained on such images anyway
                reason = (str(error).strip().splitlines() or [""])[0]
                raise GraphError(
                    f"{idle[0]!r} has no part in eval mode, and surgery would break the network in "
                    f"training mode: {reason}. Remove what only training uses first."
                ) from None


@contextmanager
def _faked(module: nn.Module) -> Iterator[tuple[FakeTensorMode, nn.Module]]:
    """Fake tensors, and a copy of `module` of them; a failure there is an answer, not logged."""
    log = logging.getLogger("torch._subclasses")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            tensors = {name: mode.from_tensor(t) for name, t in named_tensors(module).items()}
            yield mode, resized(module, tensors)
    finally:
        log.setLevel(level)


def _check_slices(
    module: nn.Module, groups: ChannelGroups, program: Program, inputs: Inputs
) -> Failure | None:
    """Trace a trial surgery; the first slice of channels whose bounds have not moved with them.

    Two such slices can agree in every shape that follows, as the halves of a swap do. The trial
    removes the first and the last channel of every group, and every other one between.
    """
    dense = list(_slices(program.exported))
    if not any(_cuts_channels(program, node) for node in dense):
        return None
    plan = _plan(groups, {g.name: range(1, max(2, g.size - 1), 2) for g in groups.groups})
    removed = removed_roots(program, groups, plan)
    pruned = list(_slices(export(apply(module, groups, plan), inputs)))
    if len(pruned) != len(dense):
        return Failure("", "other slices are taken than in the traced program")
    for node, new in zip(dense, pruned, strict=True):
        row = _sliced_row(program, node)
        if row is None or not _cuts_channels(program, node):
            continue
        stays = [program.trace.find(label) not in removed for label in row.tolist()]
        step: Any = node.args[4] if len(node.args) > 4 else 1  # what one step skips goes together
        for old, got in zip(_bounds(node), _bounds(new), strict=True):
            within = old % step
            at = old - within
            moved = sum(stays[:at]) if old >= 0 else -sum(stays[at:])
            if abs(old) < len(row) and got != moved + within:
                cut = row if got != old else row[:old] if old > 0 else row[old:]
                return Failure(module_path(node), "its channels are sliced", cut, locate(node))
    return None


def _slices(program: torch.export.ExportedProgram) -> Iterator[fx.Node]:
    nodes = (node for node in program.graph.nodes if node.op == "call_function")
    return (node for node in nodes if operator_name(node) in ("slice", "narrow"))


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


def _trial_plan(groups: ChannelGroups) -> Plan:
    """The last half or so of every group, with neighbouring groups of different widths."""
    kept = {}
    for number, group in enumerate(groups.groups):
        width = max(1, group.size // 2 - number % 3)
        kept[group.name] = range(group.size - width, group.size)
    return _plan(groups, kept)


def _plan(groups: ChannelGroups, chosen: Mapping[str, range]) -> Plan:
    kept = {name: tuple(units) for name, units in chosen.items()}
    nothing = Cost(0, 0)
    return replace(
        Plan("", "params", 1, 1, {}, kept, "", 0, nothing, nothing, groups.image_size),
        attributes=attribute_values(groups, kept),
    )


@contextmanager
def _watched(
    module: nn.Module, seen: list[tuple[str, tuple[int, ...] | None]], active: list[str]
) -> Iterator[None]:
    """Note the output shape of every leaf call, and the modules that have not returned yet.

    A leaf that gives several tensors has no such shape; what comes after it shows them.
    """

    def before(path: str) -> Callable:
        return lambda *_: active.append(path)

    def after(path: str, leaf: bool) -> Callable:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            active.pop()
            if leaf:
                seen.append((path, tuple(output.shape) if isinstance(output, Tensor) else None))

        return hook

    handles = []
    for path, layer in module.named_modules():
        leaf = not list(layer.children())
        handles.append(layer.register_forward_pre_hook(before(path)))
        handles.append(layer.register_forward_hook(after(path, leaf)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def removed_roots(program: Program, groups: ChannelGroups, plan: Plan) -> set[int]:
    """The representatives of all labels that `plan` removes."""
    removed: set[int] = set()
    for group in groups.groups:
        slot = group.slots[0]
        labels = program.tensors[slot.tensor].labels[slot.dim]
        assert labels is not None
        for unit in set(range(group.size)) - set(plan.kept[group.name]):
            removed.add(program.trace.find(int(labels[slot.positions(unit)[0]])))
    return removed


def _predicted(program: Program, value: Value, removed: set[int]) -> tuple[int | None, ...]:
    """The shape of `value` once the channels with the `removed` labels are gone.

    None where positions are all alike, as after `expand`: whoever takes them says how many.
    """
    find = program.trace.find

    def length(size: int, row: Labels | None) -> int | None:
        if row is None:
            return size
        return sum(find(label) not in removed for label in row.tolist()) if len(row) else None

    return tuple(map(length, value.shape, value.labels))


def _shown(expected: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in expected)})"
