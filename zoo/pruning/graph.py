"""Channel groups of any traced network: one mechanism for every architecture.

The network is traced with `torch.export`, the ATen program is interpreted with the rules of
`zoo.pruning.operators`, and the sets of tied labels become units and groups. Then the groups are
put to the test: a trial surgery runs under fake tensors and every layer's output shape is compared
with the predicted one. A width that hides as a constant inside `forward` shows there; if no
attribute rule repairs it, the groups that produce it are kept whole and listed as unprunable.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from zoo.cost import Cost
from zoo.errors import GraphError
from zoo.groups import ChannelGroups, Group, Slot
from zoo.models import architecture, build_model
from zoo.pruning.operators import Value
from zoo.pruning.plan import Plan
from zoo.pruning.program import Program, interpret
from zoo.pruning.surgery import apply, named_tensors, resized
from zoo.registry import stored_groups

__all__ = ["channel_groups", "reference_groups"]


def channel_groups(module: nn.Module, example_input: Tensor) -> ChannelGroups:
    """The channel groups of `module`, verified by a trial surgery under fake tensors.

    Args:
        module: a network from images (N, C, H, W) to logits (N, classes); not edited.
        example_input: one batch of the size that MACs are counted at.

    Raises:
        GraphError: if the network cannot be traced, an operator has no rule (naming the node and
            its source line), or surgery would give a wrong shape for no reason that can be pinned.
    """
    program = interpret(module, example_input)
    buffers = tuple(name for name, _ in module.named_buffers(remove_duplicate=False))
    while True:
        groups = _assemble(program, buffers)
        if not groups.groups:
            return groups
        failure = _check_shapes(module, groups, program, example_input)
        if failure is None:
            return groups
        _pin(program, failure)


def reference_groups(arch: str) -> ChannelGroups:
    """The channel groups of an architecture at its reference, traced where none are stored."""
    stored = stored_groups(arch)
    if stored is not None:
        return stored
    known = architecture(arch)
    module = build_model(arch, known.num_classes)
    return channel_groups(module, torch.zeros(1, 3, known.image_size, known.image_size))


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
    units: dict[tuple, list[int]] = {}
    first_filter: dict[tuple, str] = {}
    unprunable: dict[str, str] = {}
    for weight, row in program.trace.producers.items():
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
        slots = _slots([members[root] for root in roots])
        if slots is None:
            unprunable[name] = "its channels lie irregularly in a tensor"
            continue
        filters = tuple(
            w for w in trace.producers if any(s.tensor == w and s.dim == 0 for s in slots)
        )
        groups.append(Group(name, len(roots), slots, filters))
    return ChannelGroups(
        groups=tuple(groups),
        shapes={name: value.shape for name, value in program.tensors.items()},
        buffers=tuple(name for name in buffers if name in program.tensors),
        positions=dict(trace.positions),
        image_size=program.image_size,
        unprunable=unprunable,
    )


def _unique(name: str, groups: Sequence[Group]) -> str:
    taken = {group.name for group in groups}
    candidates = [name, *(f"{name}[{n}]" for n in range(1, len(taken) + 1))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _slots(units: list[list[tuple[str, int, int]]]) -> tuple[Slot, ...] | None:
    """The slots that give unit j the positions `units[j]`, or None if no strided slot does."""
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
        steps = np.diff(table[:, 0])
        stride = int(steps[0]) if len(steps) else table.shape[1]
        block = table.shape[1]
        affine = (np.diff(table, axis=0) == stride).all()
        if not affine or stride < 1:
            return None
        if (np.diff(table, axis=1) == 1).all():
            slots.append(Slot(name, dim, int(table[0, 0]), stride, block))
        else:
            slots += [Slot(name, dim, int(start), stride, 1) for start in table[0]]
    return tuple(slots)


# --- the check ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """Where a trial surgery went wrong: the module's path, and what was seen."""

    path: str
    message: str


def _check_shapes(
    module: nn.Module, groups: ChannelGroups, program: Program, example_input: Tensor
) -> Failure | None:
    """Prune by a trial plan under fake tensors; the first layer whose output shape is not as said.

    Args:
        module: the dense network.
        groups: its groups.
        program: its interpretation.
        example_input: as it was traced with.
    """
    plan = _trial_plan(groups)
    removed = _removed_roots(program, groups, plan)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = _fake_copy(module, mode)
        pruned = apply(fake, groups, plan).eval()
        seen: list[tuple[str, tuple[int, ...]]] = []
        active: list[str] = []
        with _watched(pruned, seen, active):
            try:
                result = pruned(mode.from_tensor(example_input))
            except Exception as error:
                where = active[-1] if active else ""
                return Failure(where, (str(error).strip().splitlines() or [""])[0])
    by_path: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for path, shape in seen:
        by_path[path].append(shape)
    taken: Counter[str] = Counter()
    for call in program.calls:
        shapes = by_path.get(call.path, [])
        if taken[call.path] >= len(shapes):
            return Failure(call.path, "was called less often than in the traced program")
        got, expected = shapes[taken[call.path]], _predicted(program, call.value, removed)
        taken[call.path] += 1
        if got != expected:
            return Failure(call.path, f"gives shape {got}, expected {expected}")
    expected = _predicted(program, program.output, removed)
    if not isinstance(result, torch.Tensor) or tuple(result.shape) != expected:
        return Failure("", f"the output has shape {getattr(result, 'shape', None)}, not {expected}")
    return None


def _trial_plan(groups: ChannelGroups) -> Plan:
    """The last half or so of every group, with neighbouring groups of different widths."""
    kept = {}
    for number, group in enumerate(groups.groups):
        width = max(1, group.size // 2 - number % 3)
        kept[group.name] = tuple(range(group.size - width, group.size))
    nothing = Cost(0, 0)
    return Plan("", "params", 1, 1, {}, kept, "", 0, nothing, nothing, groups.image_size)


def _fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    return resized(module, {n: mode.from_tensor(t) for n, t in named_tensors(module).items()})


@contextmanager
def _watched(
    module: nn.Module, seen: list[tuple[str, tuple[int, ...]]], active: list[str]
) -> Iterator[None]:
    """Note the output shape of every leaf call, and the modules that have not returned yet."""

    def before(path: str) -> Callable:
        return lambda *_: active.append(path)

    def after(path: str, leaf: bool) -> Callable:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            active.pop()
            if leaf and isinstance(output, torch.Tensor):
                seen.append((path, tuple(output.shape)))

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


def _removed_roots(program: Program, groups: ChannelGroups, plan: Plan) -> set[int]:
    """The representatives of all labels that `plan` removes."""
    removed: set[int] = set()
    for group in groups.groups:
        slot = group.slots[0]
        labels = program.tensors[slot.tensor].labels[slot.dim]
        assert labels is not None
        for unit in set(range(group.size)) - set(plan.kept[group.name]):
            removed.add(program.trace.find(int(labels[slot.positions(unit)[0]])))
    return removed


def _predicted(program: Program, value: Value, removed: set[int]) -> tuple[int, ...]:
    """The shape of `value` once the channels with the `removed` labels are gone."""
    find = program.trace.find
    return tuple(
        size if row is None else sum(find(label) not in removed for label in row.tolist())
        for size, row in zip(value.shape, value.labels, strict=True)
    )


def _pin(program: Program, failure: Failure) -> None:
    """Fix the groups whose width is a constant where the failure is; without one, raise."""
    path = failure.path
    suspects = [
        constant
        for constant in program.constants
        if path.startswith(constant.path) or constant.path.startswith(path)
    ]
    find = program.trace.find
    fixed = {find(label) for label in program.trace.fixed}
    fresh = [c for c in suspects if not fixed.issuperset(map(find, c.labels.tolist()))]
    if not fresh:
        raise GraphError(f"Surgery would break module {path!r}: {failure.message}.")
    for constant in fresh:
        program.trace.fix(
            constant.labels, f"its width {constant.value} is a constant at {constant.where}"
        )
