"""Verifies that a pruned network obeys the contract of surgery, before the user gets it.

The network is filled with random numbers and run on one small batch: pruned, and masked (dense,
with zeros for what is removed). If the two differ, a layer may compute over channels, as layer
normalisation does. Then the traced program of the dense network takes its place, run as the
contract says (`zoo.tracing.contract`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.common.notices import warn
from zoo.common.quiet import ONE_AT_A_TIME
from zoo.common.seeding import seeded
from zoo.errors import GraphError, first_line
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan
from zoo.surgery import surgery
from zoo.surgery.masking import mask
from zoo.surgery.surgery import evaluating, named_tensors, resized
from zoo.tracing.calls import Inputs, batch_of, call, leaves, mapped
from zoo.tracing.contract import difference, masked_forward, random_tensors
from zoo.tracing.graph import analyse
from zoo.tracing.hooks import has_hooks
from zoo.tracing.program import Program

__all__ = ["verify"]

BATCH = 2
ALIKE = 1e-4
"""Relative difference up to which float32 is trusted; a wrong channel gives 0.1 to 1."""
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-2}
"""The largest relative difference allowed. Networks may compute in float32 inside."""


def verify(
    module: nn.Module, groups: ChannelGroups, plan: Plan, inputs: Inputs, program: Program | None
) -> None:
    """Check that `module`, pruned by `plan`, obeys the contract of surgery.

    float32 comes first, because it is ten times as fast. If the networks differ there, float64
    decides, if the network runs in it. A warning is given if the outputs cannot be compared because
    they are random or not finite.

    Args:
        module: the dense network; not edited.
        groups, plan: its channel groups, and what to keep of them.
        inputs: those it was traced with; only the first items of the batch are used.
        program: the interpreted program that `groups` come from, if there is one.

    Raises:
        GraphError: if the pruned network does not run, or its outputs differ.
    """
    small = _small(module, inputs)
    worst = partial(
        _worst_difference, module, groups, plan, small, program if small is inputs else None
    )
    quick = worst(torch.float32, True)
    if quick is not None and quick <= ALIKE:
        return
    for dtype, bound in BOUNDS.items():
        for random in (True, False):
            found = worst(dtype, random)
            if found is not None and found > bound:
                raise GraphError(
                    f"{type(module).__name__}, pruned, does not compute what it computes with "
                    f"zeros for the removed channels: an output differs by {found:.2g} of the "
                    f"largest value. That is a bug of the zoo; verify=False skips this check."
                )
            if found is not None:
                return
    warn(f"{type(module).__name__} could not be verified: its output is random or not finite.")


def _worst_difference(
    module: nn.Module,
    groups: ChannelGroups,
    plan: Plan,
    inputs: Inputs,
    program: Program | None,
    dtype: torch.dtype,
    random: bool,
) -> float | None:
    """The largest relative difference of all outputs; None if they cannot be compared."""

    def typed(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    noise = random_tensors(module, seed=1) if random else {}
    tensors = {
        name: typed(noise.pop(name) if name in noise else tensor.detach().clone()).to(tensor.device)
        for name, tensor in named_tensors(module).items()
    }
    dense = resized(module, tensors).eval()
    pruned = surgery.apply(dense, groups, plan).eval()
    mask(dense, groups, plan)
    given = mapped(typed, inputs)
    expected = _outputs(partial(call, dense), given)
    if expected is None or not _are_comparable(expected):
        return None
    try:
        got = _run(partial(call, pruned), given)
    except Exception as error:
        cause = "If a hook does that, remove it first; else it" if has_hooks(dense) else "That"
        raise GraphError(
            f"{type(module).__name__}, pruned, does not run: {first_line(error)}. {cause} is a bug "
            f"of the zoo; verify=False skips this check."
        ) from error
    worst = _largest_difference(got, expected)
    if worst <= ALIKE:
        return worst
    again = _outputs(partial(call, dense), given, seed=1)
    if again is None or _largest_difference(again, expected) > 0:
        return None
    program = program or analyse(dense, given)[0]
    expected = _outputs(masked_forward(program, groups, plan, dense), given)
    return None if expected is None else _largest_difference(got, expected)


def _small(module: nn.Module, inputs: Inputs) -> Inputs:
    """The first two items of `inputs`, if the network runs on so few; else all of them."""
    count = batch_of(inputs)
    if count <= BATCH:
        return inputs

    def first(tensor: Tensor) -> Tensor:
        return tensor[:BATCH] if tensor.ndim and len(tensor) == count else tensor

    few = mapped(first, inputs)
    with ONE_AT_A_TIME, evaluating(module):  # threads may share the network
        return inputs if _outputs(partial(call, module), few) is None else few


def _outputs(
    forward: Callable[[Inputs], Any], inputs: Inputs, seed: int = 0
) -> tuple[Tensor, ...] | None:
    """The tensors that `forward` returns; None if it fails."""
    try:
        return _run(forward, inputs, seed)
    except Exception:  # whatever the network raises
        return None


def _run(forward: Callable[[Inputs], Any], inputs: Inputs, seed: int = 0) -> tuple[Tensor, ...]:
    # random generators and warning filters are shared by all threads
    with ONE_AT_A_TIME, seeded(seed), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return leaves(forward(mapped(torch.clone, inputs)))  # which it may overwrite


def _are_comparable(outputs: tuple[Tensor, ...]) -> bool:
    """Whether outputs can be compared: finite, not all zero, and not on the meta device."""
    if any(output.is_meta for output in outputs):
        return False
    return all(bool(o.isfinite().all()) for o in outputs) and any(bool(o.any()) for o in outputs)


def _largest_difference(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    if len(outputs) != len(expected):
        return float("inf")
    return max(map(difference, outputs, expected))
