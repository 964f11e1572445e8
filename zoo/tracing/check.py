"""The check of channel groups by trial surgery, which shows what labels cannot.

Every layer's output shape under fake tensors is compared with the predicted one. Where slices or
numbers could be wrong although all shapes are right, the pruned network is traced
(`zoo.tracing.retrace`). Parts that only training uses are run in training mode.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from zoo.errors import GraphError, first_line
from zoo.spec.cost import Cost
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan, attribute_values
from zoo.surgery.surgery import apply, named_tensors, resized
from zoo.tracing.calls import Inputs, call, leaves, mapped
from zoo.tracing.program import Program
from zoo.tracing.retrace import (
    Failure,
    agree,
    first_change,
    numbers_in,
    predicted,
    shown,
    slices_channels,
)

__all__ = ["first_failure", "removed_roots"]


def first_failure(
    module: nn.Module, groups: ChannelGroups, program: Program, inputs: Inputs
) -> Failure | None:
    """The first failure when `module` is cut by trial plans; None if there is none.

    Args:
        module: the dense network.
        groups: its channel groups.
        program: its interpreted program.
        inputs: those it was traced with.

    Raises:
        GraphError: if surgery would break a part that only training mode uses.
    """
    failure = _check_shapes(module, groups, program, inputs, _trial_plan(groups))
    if failure is None:
        failure = _check_numbers(module, groups, program, inputs)
    if failure is None:
        _check_training(module, groups, program, inputs)
    return failure


def _check_shapes(
    module: nn.Module, groups: ChannelGroups, program: Program, inputs: Inputs, plan: Plan
) -> Failure | None:
    """The first layer whose output shape under fake tensors differs from the prediction."""
    removed = removed_roots(program, groups, plan)
    with _fake_copy(module) as (mode, fake):
        pruned = apply(fake, groups, plan).eval()
        seen: list[tuple[str, tuple[int, ...] | None]] = []
        active: list[str] = []
        with _watched(pruned, seen, active):
            try:
                result = call(pruned, mapped(mode.from_tensor, inputs))
            except Exception as error:
                where = active[-1] if active else ""
                message = first_line(error)
                calls = program.calls[: len(seen)]
                before = ((made.path, row) for made in calls for row in made.value.labels)
                return Failure(where, message, before=tuple(before))
    by_path: dict[str, list[tuple[int, ...] | None]] = defaultdict(list)
    for path, shape in seen:
        by_path[path].append(shape)
    taken: Counter[str] = Counter()
    for made in program.calls:
        shapes = by_path.get(made.path, [])
        if taken[made.path] >= len(shapes):
            return Failure(made.path, "was called fewer times than in the traced program")
        got, expected = shapes[taken[made.path]], predicted(program, made.value, removed)
        taken[made.path] += 1
        if got is not None and not agree(got, expected):
            return Failure(made.path, f"returns shape {got}, expected {shown(expected)}")
    outputs = leaves(result)
    if len(outputs) != len(program.outputs):
        return Failure("", f"returns {len(outputs)} tensors, expected {len(program.outputs)}")
    for output, value in zip(outputs, program.outputs, strict=True):
        expected = predicted(program, value, removed)
        if not agree(tuple(output.shape), expected):
            return Failure("", f"returns shape {tuple(output.shape)}, expected {shown(expected)}")
    return None


def _check_training(
    module: nn.Module, groups: ChannelGroups, program: Program, inputs: Inputs
) -> None:
    """Refuse networks that surgery would break in training mode (auxiliary classifiers, ...).

    One that does not run in training mode is refused if it has idle parameters; else it passes.
    """
    idle = [name for name, _ in module.named_parameters() if name in program.idle]
    opening = f"{idle[0]!r} is not used in eval mode, and" if idle else "Eval mode works, but"
    with _fake_copy(module) as (mode, fake):
        pair = mapped(lambda tensor: torch.cat([mode.from_tensor(tensor)] * 2), inputs)
        sizes = (mapped(partial(_with_longer_sides, times), pair) for times in (1, 2, 4))
        given = next((larger for larger in sizes if _training_error(fake, larger) is None), None)
        if given is None and not idle:
            return
        if given is None:
            raise GraphError(
                f"{opening} whether surgery would break it in training mode cannot be checked: the "
                f"network does not run in training mode on such inputs: "
                f"{_training_error(fake, pair)}. Give an example input of the size that it is "
                f"trained on, or first remove the parts that only training uses."
            )
        broken = _training_error(apply(fake, groups, _trial_plan(groups)), given)
        if broken is not None:
            raise GraphError(
                f"{opening} surgery would break the network in training mode: {broken}. First "
                f"remove the parts that only training uses."
            )


def _with_longer_sides(times: int, tensor: Tensor) -> Tensor:
    """Images with `times` longer sides: an auxiliary head may need more than the network."""
    return tensor.repeat(1, 1, times, times) if tensor.ndim == 4 else tensor


def _training_error(network: nn.Module, inputs: Inputs) -> str | None:
    """The error that a network raises in training mode on `inputs`; None if it runs."""
    try:
        call(network.train(), inputs)
    except Exception as error:
        return first_line(error)
    return None


@contextmanager
def _fake_copy(module: nn.Module) -> Iterator[tuple[FakeTensorMode, nn.Module]]:
    """The fake mode and a fake copy of `module`; torch's log is silent, as errors are expected."""
    log = logging.getLogger("torch._subclasses")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            warnings.simplefilter("ignore")
            tensors = {name: mode.from_tensor(t) for name, t in named_tensors(module).items()}
            yield mode, resized(module, tensors)
    finally:
        log.setLevel(level)


def _check_numbers(
    module: nn.Module, groups: ChannelGroups, program: Program, inputs: Inputs
) -> Failure | None:
    """The first wrong slice or number of two trial surgeries, which are traced where needed.

    The first trial removes the first and last unit of every group and every other one between; the
    second keeps a quarter, because some numbers change only where few channels are left.
    """
    for step in (2, 4):
        kept = {g.name: range(1, max(2, g.size - 1), step) for g in groups.groups}
        plan = _plan(groups, kept)
        failure = _check_shapes(module, groups, program, inputs, plan)
        if failure is not None:
            return failure
        with _fake_copy(module) as (mode, fake):
            given = mapped(mode.from_tensor, inputs)
            dense, fewer = (
                numbers_in(network.eval(), given) for network in (fake, apply(fake, groups, plan))
            )
        if dense != fewer or slices_channels(program):
            pruned, removed = apply(module, groups, plan), removed_roots(program, groups, plan)
            failure = first_change(program, pruned, inputs, removed)
            if failure is not None:
                return failure
    return None


def _trial_plan(groups: ChannelGroups) -> Plan:
    """Keeps about the last half of every group; neighbouring groups get different widths."""
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
    """Record the output shape of every leaf call in `seen`, and the running modules in `active`.

    The shape is None for several tensors; later layers show theirs.
    """

    def before(path: str) -> Callable[..., Any]:
        return lambda *_: active.append(path)

    def after(path: str, leaf: bool) -> Callable[..., Any]:
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
