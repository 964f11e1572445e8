"""What a plan makes of a network, held to the contract of surgery before the user gets it.

The network is filled with random numbers and run on one small batch: pruned, and dense with zeros
in place of what is pruned. Where the two differ, a layer may compute over channels, as layer
normalisation does: then the dense one is its traced program, run as the contract says
(`zoo.tracing.contract`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.common.quiet import ONE_AT_A_TIME
from zoo.common.seeding import seeded
from zoo.errors import GraphError, first_line
from zoo.spec.groups import ChannelGroups
from zoo.spec.plan import Plan
from zoo.surgery import surgery
from zoo.surgery.masking import mask
from zoo.surgery.surgery import evaluating, named_tensors, resized
from zoo.tracing.calls import Inputs, batch_of, call, leaves, mapped
from zoo.tracing.contract import difference, masked_forward, random_tensors
from zoo.tracing.graph import analyse
from zoo.tracing.program import Program

__all__ = ["verify"]

BATCH = 2
ALIKE = 1e-4
"""Up to which relative difference single precision is believed; a wrong channel gives 0.1 to 1."""
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-2}
"""The largest relative difference. Networks may compute in single precision inside."""


def verify(
    module: nn.Module, groups: ChannelGroups, plan: Plan, inputs: Inputs, program: Program | None
) -> None:
    """Hold what `plan` makes of `module` to the contract of surgery.

    Single precision comes first, which is ten times as fast; where the two differ there, double
    precision decides, if the network runs in it. Where nothing can be told, because the output is
    random or no number, a warning says so.

    Args:
        module: the dense network; not edited.
        groups, plan: its groups, and what to keep of them.
        inputs: as it was traced with; the first items of the batch are used.
        program: the interpretation that `groups` come from, where it is at hand.

    Raises:
        GraphError: if the pruned network computes anything else, or does not run.
    """
    small = _small(module, inputs)
    worst = partial(_worst, module, groups, plan, small, program if small is inputs else None)
    quick = worst(torch.float32, True)
    if quick is not None and quick <= ALIKE:
        return
    for dtype, bound in BOUNDS.items():
        for random in (True, False):
            found = worst(dtype, random)
            if found is not None and found > bound:
                raise GraphError(
                    f"{type(module).__name__}, pruned, computes something else than with zeros in "
                    f"place of the channels: an output differs by {found:.2g} of the largest "
                    f"value. That is a fault of the zoo; verify=False prunes all the same."
                )
            if found is not None:
                return
    warnings.warn(
        f"{type(module).__name__} could not be verified: its output is random, or no number.",
        stacklevel=4,
    )


def _worst(
    module: nn.Module,
    groups: ChannelGroups,
    plan: Plan,
    inputs: Inputs,
    program: Program | None,
    dtype: torch.dtype,
    random: bool,
) -> float | None:
    """The largest difference of all outputs; None where such numbers do not show it."""

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
    if expected is None or not _is_telling(expected):
        return None
    try:
        got = _run(partial(call, pruned), given)
    except Exception as error:
        raise GraphError(
            f"{type(module).__name__}, pruned, does not run: {first_line(error)}. That is a fault "
            f"of the zoo; verify=False prunes all the same."
        ) from error
    worst = _largest(got, expected)
    if worst <= ALIKE:
        return worst
    again = _outputs(partial(call, dense), given, seed=1)
    if again is None or _largest(again, expected) > 0:
        return None
    program = program or analyse(dense, given)[0]
    expected = _outputs(masked_forward(program, groups, plan, dense), given)
    return None if expected is None else _largest(got, expected)


def _small(module: nn.Module, inputs: Inputs) -> Inputs:
    """The first items of `inputs`, if the network takes so few; else all of them."""
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
    """The tensors that `forward` gives; None if it fails."""
    try:
        return _run(forward, inputs, seed)
    except Exception:  # whatever the network raises
        return None


def _run(forward: Callable[[Inputs], Any], inputs: Inputs, seed: int = 0) -> tuple[Tensor, ...]:
    # random generators and warnings' filters are the whole process's
    with ONE_AT_A_TIME, seeded(seed), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return leaves(forward(inputs))


def _is_telling(outputs: tuple[Tensor, ...]) -> bool:
    """Whether all are numbers, and not nothing but zeros; those of the meta device have none."""
    if any(output.is_meta for output in outputs):
        return False
    return all(bool(o.isfinite().all()) for o in outputs) and any(bool(o.any()) for o in outputs)


def _largest(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    if len(outputs) != len(expected):
        return float("inf")
    return max(map(difference, outputs, expected))
