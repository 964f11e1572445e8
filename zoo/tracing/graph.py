"""Channel groups of any network that can be traced: one mechanism for every architecture.

`zoo.tracing.program` traces the network and passes channel labels through its operators.
`zoo.tracing.attributes` finds integers that repeat a width. Here, sets of tied labels become units
and channel groups, and `zoo.tracing.check` tests them. A failure means that a width is a constant
inside `forward`: the groups that produce it are kept whole and listed as unprunable, and the rest
is tested again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import fx, nn

from zoo.common.quiet import ONE_AT_A_TIME
from zoo.errors import GraphError
from zoo.spec.groups import ChannelGroups, Group, Slot
from zoo.surgery.surgery import is_repaired
from zoo.tracing.attributes import attribute_labels
from zoo.tracing.calls import Inputs
from zoo.tracing.check import first_failure
from zoo.tracing.hooks import has_hooks, without_observers
from zoo.tracing.labels import Labels, Value, is_channels
from zoo.tracing.program import Program, integers, interpret, locate, module_path
from zoo.tracing.retrace import Failure

__all__ = ["analyse", "channel_groups"]


def channel_groups(module: nn.Module, inputs: Inputs) -> ChannelGroups:
    """The channel groups of `module`, verified by a trial surgery under fake tensors.

    Args:
        module: a network that returns tensors, in any structure; not edited.
        inputs: what it is called with, of the size that MACs are counted at.

    Raises:
        GraphError: if the network cannot be traced, or if surgery would break it and keeping no
            group whole prevents that.
    """
    return analyse(module, inputs)[1]


def analyse(module: nn.Module, inputs: Inputs) -> tuple[Program, ChannelGroups]:
    """As `channel_groups`, with the interpreted program that they come from."""
    with ONE_AT_A_TIME:
        return _analysed(without_observers(module, inputs), inputs)


def _analysed(module: nn.Module, inputs: Inputs) -> tuple[Program, ChannelGroups]:
    program = interpret(module, inputs)
    buffers = tuple(name for name, _ in module.named_buffers(remove_duplicate=False))
    for name, row in attribute_labels(module, program).items():
        program.tensors[name] = Value((len(row),), (row,), name)
    while True:
        groups = _assemble(program, buffers)
        if not groups.groups:
            return program, groups
        failure = first_failure(module, groups, program, inputs)
        if failure is None:
            return program, groups
        _pin(module, program, failure)


# --- groups ---------------------------------------------------------------------------------------


def _assemble(program: Program, buffers: tuple[str, ...]) -> ChannelGroups:
    """Sets of tied labels as units, and units with the same slots as groups."""
    trace = program.trace
    fixed: dict[int, str] = {}
    for label, reason in trace.fixed.items():
        root = trace.find(label)
        fixed[root] = fixed.get(root) or reason
    members: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    for name, value in program.tensors.items():
        for dim, row in enumerate(value.labels):
            for position, label in enumerate(() if row is None else row.tolist()):
                members[trace.find(label)].append((name, dim, position))
    seen: set[int] = set()
    units: dict[tuple[Any, ...], list[int]] = {}
    first_filter: dict[tuple[Any, ...], str] = {}
    unprunable: dict[str, str] = {}
    for (weight, _), row in program.trace.producers.items():
        for label in row.tolist():
            root = trace.find(label)
            if root in fixed:
                if fixed[root]:
                    unprunable[weight.removesuffix(".weight")] = fixed[root]
                continue
            if root in seen:
                continue
            seen.add(root)
            signature = tuple(sorted(Counter((n, d) for n, d, _ in members[root]).items()))
            units.setdefault(signature, []).append(root)
            first_filter.setdefault(signature, weight)
    groups: list[Group] = []
    for signature, roots in units.items():
        name = _unique(first_filter[signature].removesuffix(".weight"), groups)
        if len(roots) == 1:
            unprunable[name] = "has only one unit"
            continue
        slots = _slots([members[root] for root in roots])
        own = {(slot.tensor, slot.dim) for slot in slots}
        filters, dims = zip(*(home for home in trace.producers if home in own), strict=True)
        groups.append(Group(name, len(roots), slots, filters, dims if any(dims) else ()))
    positions, fixed_macs = trace.counted()
    return ChannelGroups(
        groups=tuple(groups),
        shapes={name: value.shape for name, value in program.tensors.items() if ":" not in name},
        buffers=tuple(name for name in buffers if name in program.tensors),
        positions=positions,
        image_size=program.image_size,
        inputs=program.inputs,
        unprunable=unprunable,
        attributes={
            slot.tensor: program.tensors[slot.tensor].shape[0]
            for group in groups
            for slot in group.slots
            if ":" in slot.tensor
        },
        fixed_macs=fixed_macs,
    )


def _unique(name: str, groups: Sequence[Group]) -> str:
    taken = {group.name for group in groups}
    candidates = [name, *(f"{name}[{n}]" for n in range(1, len(taken) + 1))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _slots(units: list[list[tuple[str, int, int]]]) -> tuple[Slot, ...]:
    """Slots in which unit j has the positions `units[j]`, a list of (tensor, dim, position)."""
    tables: dict[tuple[str, int], list[list[int]]] = defaultdict(list)
    for unit in units:
        own: dict[tuple[str, int], list[int]] = defaultdict(list)
        for name, dim, position in unit:
            own[name, dim].append(position)
        for key, positions in own.items():
            tables[key].append(sorted(positions))
    slots: list[Slot] = []
    for (name, dim), rows in tables.items():
        table = np.array(rows)
        steps = np.diff(table, axis=0)
        stride, block = int(steps[0, 0]), table.shape[1]
        solid = (np.diff(table, axis=1) == 1).all()
        columns, block = ([table[:, 0]], block) if solid else (list(table.T), 1)
        if stride >= 1 and (steps == stride).all():
            slots += [Slot(name, dim, int(column[0]), stride, block) for column in columns]
        else:
            slots += [Slot(name, dim, block=block, at=tuple(column.tolist())) for column in columns]
    return tuple(slots)


# --- what stays whole ---------------------------------------------------------------------------


def _pin(module: nn.Module, program: Program, failure: Failure) -> None:
    """Fix the groups whose width is a constant at the place of the failure; raise if none is."""
    path = failure.path
    suspects = [
        constant
        for constant in program.constants
        if constant.literal
        and (_is_within(path, constant.path) or _is_within(constant.path, path))
        and not is_repaired(module.get_submodule(constant.path))
    ]
    find = program.trace.find
    fixed = program.trace.fixed_roots()

    def free(rows: Iterable[tuple[Labels, str]]) -> list[tuple[Labels, str]]:
        return [(r, where) for r, where in rows if not fixed.issuperset(map(find, r.tolist()))]

    if failure.row is not None:
        fresh = free([(failure.row, failure.where)])
    else:
        fresh = free((constant.labels, constant.where) for constant in suspects)
    if not fresh:
        fresh = free(_rows_of_stated_widths(program, path))[:1]
    why = failure.reason
    if not fresh:
        why = f"is used in a computation that fails ({failure.message})"
        fresh = free((r, f"a call after {at!r}") for at, r in failure.before if is_channels(r))[-1:]
    if not fresh and path in program.flows:
        into, _ = program.flows[path]
        fresh = free((row, f"a call of {path!r}") for row in into.labels if is_channels(row))
    if not fresh:
        at = f" at {failure.where}" if failure.where else ""
        advice = "" if isinstance(module, fx.GraphModule) else " Prune it with rewrite=True."
        if has_hooks(module):
            advice = " If a forward hook does that, remove it first."
        raise GraphError(f"Surgery would break module {path!r}: {failure.message}{at}.{advice}")
    for row, where in fresh:
        reason = f"its width {len(row)} {why} at {where}"
        if why == Failure.reason:
            reason += (
                ": take it from the tensor (x.flatten(1), x.shape[1]), or prune with rewrite=True"
            )
        program.trace.fix(row, reason)


def _rows_of_stated_widths(program: Program, path: str) -> Iterator[tuple[Labels, str]]:
    """Produced rows whose length equals an integer near the failure, whatever that counts."""
    for node in program.exported.graph.nodes:
        module = module_path(node)
        if _is_within(path, module) or _is_within(module, path):
            stated = set(integers((*node.args, *node.kwargs.values())))
            for row in program.trace.producers.values():
                if len(row) in stated:
                    yield row, locate(node)


def _is_within(path: str, module: str) -> bool:
    return not module or f"{path}.".startswith(f"{module}.")
