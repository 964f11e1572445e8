"""Iterative pruning: prune a little, train, repeat, with the same plan, surgery and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from zoo.criteria.scores import CRITERIA, channel_scores, labelled_batches
from zoo.criteria.weight_scores import Scores
from zoo.errors import ZooError, integer
from zoo.loading import Weights, load, prune
from zoo.planning.latency import latency_table
from zoo.planning.request import Request, plan_of, planned, request
from zoo.planning.solver import solve
from zoo.spec.cost import CostModel, cost_model
from zoo.spec.groups import ChannelGroups, Slot
from zoo.spec.plans import Plan, PruningRecord, kept_positions
from zoo.spec.profile import Profile
from zoo.surgery.surgery import apply
from zoo.tracing.known_groups import groups_of, traced_groups
from zoo.tracing.verification import verify
from zoo.training.finetuning import TrainResult, finetune
from zoo.training.loaders import Data, found
from zoo.training.recipes import Recipe, read_recipe

__all__ = ["IterativeResult", "IterativeStep", "Schedule", "prune_iteratively"]


@dataclass(frozen=True)
class Schedule:
    """The compression at the end, the number of steps, and the training after each step."""

    cf: float
    """compression factor, dense / pruned, after the last step"""
    steps: int = 5
    """number of steps; their factors rise geometrically from 1 to that of the last step"""
    profile: str | Profile = "best"
    """as in `zoo.load`; for a live network as in `zoo.prune`"""
    metric: str = "params"
    """what the factor counts"""
    criterion: str = "random"
    """how channels are scored; computed again before every step"""
    seed: int = 0
    """of the random choices and the training"""
    align: int = 1
    """every width of the last step is a multiple of it, or not cut"""
    floor: float = 0.0
    """smallest keep ratio of any channel group"""
    keep: Mapping[str, float] = field(default_factory=dict)
    """module name or prefix -> keep ratio that its channel groups are pinned to"""
    recipe: str | Recipe = "quick"
    """how to train after each step"""


@dataclass(frozen=True)
class IterativeStep:
    """One step: the plan so far, from the dense network, and the training after it."""

    plan: Plan
    training: TrainResult


@dataclass(frozen=True)
class IterativeResult:
    """The pruned network, as `load` and `prune` return it, and all steps."""

    model: nn.Module
    steps: tuple[IterativeStep, ...]


@torch.inference_mode(mode=False)  # whose tensors could not be trained
def prune_iteratively(
    weights: Weights,
    train: Data,
    val: Data,
    schedule: Schedule,
    *,
    arch: str = "",
    example_input: Tensor | None = None,
) -> IterativeResult:
    """Prune a little, train, repeat, until the network is as small as `load` would make it.

    The last widths are those of the profile or policy for the dense network; earlier ones lie
    between, so that each step meets its factor of the dense network. Each step scores the channels
    of the network as it then is, so kept channels are nested.

    Args:
        weights: a checkpoint, as in `zoo.load`, with `arch`; or a live network with
            `example_input`. Neither is changed.
        train, val: as in `zoo.finetune`; policies and criteria that need data get the training
            images.
        schedule: compression, number of steps, and training.
        arch: a registered name, `torchvision:<name>` or `timm:<name>`.
        example_input: one batch (N, C, H, W), as in `zoo.prune`.

    Returns:
        The model, on the device it was trained on, and the steps. Ctrl-C during training ends the
        pruning after that step.

    Raises:
        ZooError: as `zoo.load`, `zoo.prune` and `zoo.finetune`, and if not exactly one of `arch`
            and `example_input` is given.
        DataError: as `zoo.finetune`.
    """
    steps = _checked(schedule)
    asked = request(
        schedule.profile, arch, cf=schedule.cf, metric=schedule.metric,
        criterion=schedule.criterion, seed=schedule.seed, align=schedule.align,
        floor=schedule.floor, keep=schedule.keep, data=True,
    )  # fmt: skip
    dense, groups = _dense_network(weights, arch, example_input)
    train, val = found(train, "train", dense), found(val, "val", dense)
    model, record = dense, cast(Any, dense.pruning)
    goal = planned(model, groups, replace(asked, criterion="random"), train)
    if example_input is not None:  # before any training
        verify(model, groups, goal, example_input, None)
    asked = replace(asked, name=goal.profile)
    times = latency_table(model, groups) if asked.metric == "latency" else None
    costs = cost_model(groups, times)
    groups = replace(groups, unprunable=goal.unprunable)
    plan: Plan = record.plan
    done: list[IterativeStep] = []
    for number in range(1, steps + 1):
        factor = max(plan.got, goal.got ** (number / steps))
        widths = goal.widths if number == steps else _between(costs, goal, plan, factor)
        step = replace(asked, cf=asked.cf if number == steps else factor)
        current = _remaining(groups, plan)
        scores = _scores(model, current, step, train)
        cut = plan_of(replace(step, metric="params"), current, widths, scores)
        plan = plan_of(step, groups, widths, _composed(groups, plan, cut), times)
        model = apply(model, current, cut, dense)
        model.pruning = replace(record, plan=plan)
        training = finetune(model, train, val, recipe=schedule.recipe, seed=asked.seed)
        done.append(IterativeStep(plan, training))
        if training.interrupted:
            break
    return IterativeResult(model, tuple(done))


def _checked(schedule: Schedule) -> int:
    """The number of steps; also refuses early a recipe that the first training would refuse."""
    if not isinstance(schedule, Schedule):
        raise ZooError(f"A schedule is a zoo.Schedule, got {type(schedule).__name__}.")
    read_recipe(schedule.recipe)
    return integer("steps", schedule.steps, 1)


def _dense_network(
    weights: Weights, arch: str, example_input: Tensor | None
) -> tuple[nn.Module, ChannelGroups]:
    """A copy of the dense network, with the record of a plan that keeps all, and its groups."""
    if arch and example_input is None:
        model = load(arch, 1, weights, profile="equal")
        record = cast(PruningRecord, model.pruning)
        return model, groups_of(arch, model, record.size, record.in_channels)
    if not arch and example_input is not None:
        model = prune(cast(nn.Module, weights), example_input, cf=1, profile="equal")
        return model, traced_groups(model, example_input)[1]
    raise ZooError("Give arch= for a checkpoint, or example_input= for a live network.")


def _between(costs: CostModel, goal: Plan, plan: Plan, factor: float) -> dict[str, int]:
    """Widths between those of `plan` and `goal` that meet `factor`."""
    ends = [(ratio, plan.keep_ratios[name]) for name, ratio in goal.keep_ratios.items()]
    solution = solve(
        costs, lambda t: [last ** (1 - t) * now**t for last, now in ends], factor, goal.metric
    )
    return dict(zip(goal.keep_ratios, solution.widths, strict=True))


def _remaining(groups: ChannelGroups, plan: Plan) -> ChannelGroups:
    """The channel groups after `plan`: the kept units at their new positions."""
    left = kept_positions(groups, plan.kept)

    def moved(slot: Slot, units: Sequence[int]) -> Slot:
        everything = range(groups.length(slot.tensor, slot.dim))
        old = left.get(slot.tensor, {}).get(slot.dim, everything)
        new = {position: number for number, position in enumerate(old)}
        at = tuple(new[slot.positions(unit)[0]] for unit in units)
        return replace(slot, start=0, stride=1, at=at)

    remaining = []
    for group in groups.groups:
        kept = plan.kept[group.name]
        slots = tuple(moved(slot, kept) for slot in group.slots)
        remaining.append(replace(group, size=len(kept), slots=slots))
    shapes = {
        name: tuple(len(left.get(name, {}).get(dim, range(n))) for dim, n in enumerate(shape))
        for name, shape in groups.shapes.items()
    }
    return replace(groups, groups=tuple(remaining), shapes=shapes, attributes=plan.attributes)


def _scores(
    model: nn.Module, groups: ChannelGroups, asked: Request, train: Dataset[Any] | DataLoader[Any]
) -> Scores:
    batches = None
    if CRITERIA[asked.criterion].needs_data:
        batches = labelled_batches(train, next(model.parameters()).device, asked.seed)
    return channel_scores(asked.criterion, model, groups, asked.seed, batches)


def _composed(groups: ChannelGroups, plan: Plan, cut: Plan) -> Scores:
    """Scores of the dense network: 1 for units that `cut` keeps of those `plan` kept, else 0."""
    kept = {name: {plan.kept[name][unit] for unit in cut.kept[name]} for name in groups.names}
    return [[float(unit in kept[g.name]) for unit in range(g.size)] for g in groups.groups]
