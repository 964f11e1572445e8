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
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from zoo.cost import Cost
from zoo.errors import GraphError
from zoo.groups import ChannelGroups, Group, Slot
from zoo.pruning.operators import RULES, Labels, Trace, Value
from zoo.pruning.plan import Plan
from zoo.pruning.surgery import apply, named_tensors, resized

__all__ = ["channel_groups", "check_shapes"]

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


def channel_groups(module: nn.Module, example_input: Tensor) -> ChannelGroups:
    """The channel groups of `module`, verified by a trial surgery under fake tensors.

    Args:
        module: a network from images (N, C, H, W) to logits (N, classes); not edited.
        example_input: one batch of the size that MACs are counted at.

    Raises:
        GraphError: if the network cannot be traced, an operator has no rule (naming the node and
            its source line), or surgery would give a wrong shape for no reason that can be pinned.
    """
    program = _interpret(module, example_input)
    buffers = tuple(name for name, _ in module.named_buffers(remove_duplicate=False))
    while True:
        groups = _assemble(program, buffers)
        if not groups.groups:
            return groups
        failure = check_shapes(module, groups, program, example_input)
        if failure is None:
            return groups
        _pin(program, failure)


def _interpret(module: nn.Module, example_input: Tensor) -> Program:
    modes = {layer: layer.training for layer in module.modules()}
    try:
        module.eval()
        exported = torch.export.export(module, (example_input,))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise GraphError(
            f"torch.export cannot trace {type(module).__name__}: {reason[0]}"
        ) from error
    finally:
        for layer, training in modes.items():
            layer.training = training
    names = _input_names(exported)
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


def _input_names(exported: torch.export.ExportedProgram) -> dict[str, str]:
    """placeholder name -> the parameter's or buffer's full name."""
    return {
        spec.arg.name: spec.target
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


def check_shapes(
    module: nn.Module,
    groups: ChannelGroups,
    program: Program,
    example_input: Tensor,
    plan: Plan | None = None,
) -> Failure | None:
    """Run the pruned network under fake tensors; compare every layer's output shape.

    Args:
        module: the dense network.
        groups: its groups.
        program: its interpretation.
        example_input: as it was traced with.
        plan: what to keep; by default a trial that gives neighbouring groups different widths.

    Returns:
        None when every shape is as predicted, else the first place where one is not.
    """
    plan = plan or _trial_plan(groups)
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
    """About half of every group, neighbours different, spread over the parts of the group."""
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
