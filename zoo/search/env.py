"""The paper's Markov decision process (section 4.1) as a gymnasium environment.

Importing this module registers `zoo/Pruning-v0`, so that

    gymnasium.make("zoo.search.env:zoo/Pruning-v0", tasks=..., groups=..., cf=4, evaluate=...)

makes one. `zoo.search.vector_env` steps many together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.criteria.scores import random_scores
from zoo.errors import ZooError, integer, unknown
from zoo.planning.solver import FLOOR, Solution, round_widths, scale_curve, solve
from zoo.search.evaluation import Evaluate
from zoo.search.observation import VIEWS, describe, observe
from zoo.search.reward import REWARDS, Outcome
from zoo.search.tasks import SEARCH_SEEDS, Candidate, Task, check_tasks
from zoo.spec.cost import CostModel, cost_model
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import Metric

try:
    import gymnasium
except ImportError:
    raise ZooError("The search needs gymnasium: pip install 'prunezoo[search]'.") from None

__all__ = [
    "ENV_ID",
    "FEATURES",
    "PROJECTIONS",
    "Entry",
    "EnvSettings",
    "PruningEnv",
    "Rollout",
    "keep_ratio",
]

ENV_ID = "zoo/Pruning-v0"
PROJECTIONS = ("none", "scale", "bound")
FEATURES = ("static", "live")

Array = NDArray[np.float32]
LiveFeatures = Callable[[Candidate], tuple[NDArray, ...]]


@dataclass(frozen=True)
class EnvSettings:
    """The settings of the decision process.

    Raises:
        ZooError: for an unknown projection, reward, observation or kind of features.
    """

    metric: Metric = "params"
    """what is compressed"""
    projection: Literal["none", "scale", "bound"] = "scale"
    """scale: profiles meet the factor; bound: at least the factor; none: left to the reward"""
    reward: Literal["gaussian", "n2n", "hyperbolic"] = "gaussian"
    """reward of a finished episode"""
    sigma: float | None = None
    """σ of the gaussian reward, in units of the factor; by default a tenth of the asked factor"""
    observation: Literal["summary", "raw"] = "summary"
    """summary: quantiles of a group's features; raw: those of every channel"""
    features: Literal["static", "live"] = "static"
    """static: the dense network's features; live: those of the network as pruned so far, computed
    anew whenever a search is run or resumed"""
    draws: int = 1
    """draws of random channels that an episode's accuracy is the mean of; each is an evaluation"""

    def __post_init__(self) -> None:
        for kind, value, choices in (
            ("projection", self.projection, PROJECTIONS),
            ("reward", self.reward, REWARDS),
            ("observation", self.observation, VIEWS),
            ("features", self.features, FEATURES),
        ):
            if value not in choices:
                raise unknown(kind, value, choices)
        if self.sigma is not None and not self.sigma > 0:
            raise ZooError(f"sigma must be positive, got {self.sigma}.")
        integer("draws", self.draws, 1)


@dataclass(frozen=True)
class Entry:
    """One entry of the queue: a task and a factor to reach on it.

    Attributes:
        task, cf: the task and the asked compression factor.
        equal: the keep ratio of the equal policy at `cf`.
        channel_seeds: seeds of the channels that all episodes of the task keep, one per draw.
        order: per group, the indices of its channels in the first draw; the first ones are kept.
        start: keep ratios of the profile that the search starts from, if there is one.
    """

    task: Task
    cf: float
    equal: float
    channel_seeds: tuple[int, ...]
    order: tuple[NDArray[np.intp], ...]
    start: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Rollout:
    """A finished episode whose accuracy is still to be measured.

    Attributes:
        entry: the entry of the queue that it was played on.
        actions: the keep ratios that were asked for.
        widths, keep_ratios: those of the profile, after projection.
        factor: compression factor of `widths`.
    """

    entry: Entry
    actions: tuple[float, ...]
    widths: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    factor: float

    @property
    def candidates(self) -> list[Candidate]:
        """What is measured: the profile with the channels of every draw."""
        return [Candidate(self.entry.task, self.widths, s) for s in self.entry.channel_seeds]

    def outcome(self, accuracy: float, sigma: float | None) -> Outcome:
        """The `Outcome` that the reward is computed from."""
        sizes = self.entry.task.groups.sizes
        kept = [width / size for width, size in zip(self.widths, sizes, strict=True)]
        entry, base = self.entry, self.entry.task.base_accuracy
        return Outcome(accuracy, base, self.factor, entry.cf, kept, entry.equal, sigma)


class PruningEnv(gymnasium.Env[Array, Array]):
    """One step per channel group, one profile per episode, one task and factor per episode.

    An action in [-1, 1] is the keep ratio β of the present group, rescaled to [0.1, 1] (paper,
    section 8.2); later groups are whole. The reward is 0 except at the end of an episode
    (`zoo.search.reward`). `zoo.search.observation` says what the agent sees.

    Tasks times factors are a circular queue: `reset(seed=s)` rewinds it to entry s modulo its
    length, `reset()` advances to the next. Each task has one random choice of channels, the same in
    all its episodes, so that two rewards differ by the profile, not by the luck of the draw; with
    `draws`, it has several, and an episode's accuracy is their mean.

    With a `start`, actions are corrections of that profile: 0 is its keep ratio, -1 is 0.1 and 1 is
    1, linearly on either side.

    Projections: `none` takes the actions as they are. `scale` multiplies all β by a common
    scale after the last action, to meet the factor to the solver's tolerance. `bound` lowers an
    action if the later groups, all at 0.1, could not reach the factor otherwise (He et al., 2018,
    AMC). The profile then has the factor or a larger one, even a much larger one, rounding
    included, if keep ratios of 0.1 reach the factor at all.

    The last step's `info` holds the episode: `task` (name), `cf`, `channel_seed`, `actions` (β as
    the agent chose them), `widths`, `keep_ratios`, `factor`, `accuracy` and `reward`.

    Args:
        tasks: of one architecture.
        groups: of the reference network, whose factor is `cf`.
        cf: the compression factor asked for; or several, for an agent that observes which.
        evaluate: candidates -> validation accuracies in [0, 1].
        settings: of the decision process.
        cost: of the reference network; by default parameters and MACs of `groups`.
        live_features: candidate -> Taylor features of the network pruned to its widths and
            recalibrated, per group one entry per dense channel, 0 where pruned. With `live`
            features it is called before every decision but the first.
        start: factor -> keep ratios to start from, one per group; those below 0.1 count as 0.1.

    Attributes:
        queue: the entries of the circular queue.

    Raises:
        FactorError: if no keep ratios of at least 0.1 reach `cf`, naming the reachable range.
        ZooError: for no tasks or factors, tasks of different architectures, a latency that was not
            measured, live features without the function for them, or a start without one keep
            ratio for every group.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        tasks: Sequence[Task],
        groups: ChannelGroups,
        cf: float | Sequence[float],
        evaluate: Evaluate,
        settings: EnvSettings = EnvSettings(),
        *,
        cost: CostModel | None = None,
        live_features: LiveFeatures | None = None,
        start: Mapping[float, Sequence[float]] | None = None,
    ) -> None:
        check_tasks(tasks)
        self.cost = cost_model(groups) if cost is None else cost
        theirs = tasks[0].groups
        if (theirs.names, theirs.sizes) != (groups.names, groups.sizes):
            raise ZooError(f"The task {tasks[0].name} does not have the reference's groups.")
        if self.cost.sizes != groups.sizes:
            raise ZooError("The cost model is that of another network than the reference.")
        if settings.features == "live" and live_features is None:
            raise ZooError("Live features need live_features, the function that computes them.")
        self.tasks, self.groups, self.evaluate = tuple(tasks), groups, evaluate
        self.settings = settings
        self._live_features = live_features if settings.features == "live" else None
        self.factors = tuple(float(factor) for factor in np.atleast_1d(cf))
        if not self.factors:
            raise ZooError("A search needs at least one compression factor.")
        self.queue = self._make_queue(start)
        self._floor = round_widths(groups.sizes, [FLOOR] * len(groups.sizes))
        self._largest_factor = self._factor(self._floor)
        self._descriptors = describe(self.cost)
        self._next = 0
        self.begin(0)
        length = len(self.observe())
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (length,), np.float32)

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode on the next entry of the queue, or on the one that `seed` fixes."""
        super().reset(seed=seed)
        number = self._next if seed is None else seed
        self.begin(number)
        self._next = number + 1
        return self.observe(), {"task": self.entry.task.name, "cf": self.entry.cf}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Decide the keep ratio of the next group by `action`, of shape (1,)."""
        self.act(float(np.asarray(action).item()))
        if not self.finished:
            return self.observe(), 0.0, False, False, {}
        [info] = self.score([self.finish()])
        return self.observe(), info["reward"], True, False, info

    def begin(self, number: int) -> None:
        """Begin episode `number` (0, 1, ...) of the circular queue."""
        self.entry = self.queue[number % len(self.queue)]
        self._asked: list[float] = []
        self._betas: list[float] = []

    def act(self, action: float) -> None:
        """Decide on the next group by an action in [-1, 1]."""
        start = self.entry.start
        self.decide(keep_ratio(action, None if start is None else start[len(self._asked)]))

    def decide(self, beta: float) -> None:
        """Keep the share `beta` of the next group's channels, or less if `bound` requires it."""
        self._asked.append(beta)
        bound = self.settings.projection == "bound"
        self._betas.append(self._bounded(beta) if bound else beta)

    @property
    def finished(self) -> bool:
        """Whether every group was decided on."""
        return len(self._asked) == len(self.groups.sizes)

    def finish(self) -> Rollout:
        """The finished episode, after one decision per group."""
        widths, betas = round_widths(self.groups.sizes, self._betas), tuple(self._betas)
        if self.settings.projection == "scale":
            solution = self._solve(betas, self.entry.cf)
            widths, betas = solution.widths, solution.keep_ratios
        return Rollout(self.entry, tuple(self._asked), widths, betas, self._factor(widths))

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        """The infos of finished episodes, which are evaluated together.

        Raises:
            ZooError: for an accuracy that is not a number in [0, 1].
        """
        reward, sigma = REWARDS[self.settings.reward], self.settings.sigma
        each = self.evaluate([c for rollout in rollouts for c in rollout.candidates])
        accuracies = np.reshape(each, (len(rollouts), self.settings.draws)).mean(1).tolist()
        return [
            {
                "task": rollout.entry.task.name,
                "cf": rollout.entry.cf,
                "channel_seed": rollout.entry.channel_seeds[0],
                "actions": rollout.actions,
                "widths": rollout.widths,
                "keep_ratios": rollout.keep_ratios,
                "factor": rollout.factor,
                "accuracy": accuracy,
                "reward": float(reward(rollout.outcome(accuracy, sigma))),
            }
            for rollout, accuracy in zip(rollouts, accuracies, strict=True)
        ]

    def observe(self) -> Array:
        """The present observation, of shape `observation_space.shape`."""
        step, sizes = len(self._betas), self.groups.sizes
        betas = self._betas + [1.0] * (len(sizes) - step)
        widths = round_widths(sizes, betas)
        previous = (step - 1) % len(sizes)
        kept = np.zeros(sizes[previous], dtype=bool)
        kept[self.entry.order[previous][: widths[previous]]] = True
        features = self.entry.task.features
        if self._live_features and 0 < step < len(sizes):
            candidate = Candidate(self.entry.task, widths, self.entry.channel_seeds[0])
            features = self._live_features(candidate)
        view = VIEWS[self.settings.observation](features, previous, kept)
        rest = [self._scaled(self._factor(widths)), betas[previous]]
        if len(self.factors) > 1:
            rest.append(self._scaled(self.entry.cf))
        return observe(self._descriptors, step, view, rest)

    def _make_queue(self, start: Mapping[float, Sequence[float]] | None) -> tuple[Entry, ...]:
        whole = [1.0] * len(self.groups.sizes)
        equal = {cf: fmean(self._solve(whole, cf).keep_ratios) for cf in self.factors}
        starts = {cf: None if start is None else self._checked(start, cf) for cf in self.factors}
        queue = []
        for position, task in enumerate(self.tasks):
            first, step = SEARCH_SEEDS[0] + position, len(self.tasks)
            seeds = tuple(range(first, first + step * self.settings.draws, step))
            scores = random_scores(self.groups, first)
            order = tuple(np.argsort(-np.array(group), kind="stable") for group in scores)
            queue += [Entry(task, cf, equal[cf], seeds, order, starts[cf]) for cf in self.factors]
        return tuple(queue)

    def _checked(self, start: Mapping[float, Sequence[float]], cf: float) -> tuple[float, ...]:
        """The keep ratios to start from at `cf`, at least `FLOOR`."""
        ratios = tuple(start.get(cf, ()))
        if len(ratios) != len(self.groups.sizes) or not all(0 < ratio <= 1 for ratio in ratios):
            raise ZooError(
                f"A start at {cf:g}x needs {len(self.groups.sizes)} keep ratios in (0, 1], "
                f"got {list(ratios)}."
            )
        return tuple(max(FLOOR, ratio) for ratio in ratios)

    def _bounded(self, beta: float) -> float:
        """`beta`, or the largest smaller keep ratio that lets later groups reach the factor."""
        group, sizes = len(self._betas), self.groups.sizes
        decided = round_widths(sizes[: group + 1], [*self._betas, beta])
        widths = [*decided, *self._floor[group + 1 :]]
        least, asked = self._floor[group], widths[group]

        def misses(width: int) -> bool:
            widths[group] = width
            return self._factor(widths) < self.entry.cf

        if not misses(asked):
            return beta
        most = least + bisect_left(range(least + 1, asked + 1), True, key=misses)
        return max(FLOOR, most / sizes[group])

    def _solve(self, betas: Sequence[float], cf: float) -> Solution:
        return solve(self.cost, scale_curve(betas), cf, self.settings.metric)

    def _factor(self, widths: Sequence[int]) -> float:
        return self.cost.factor(widths, self.settings.metric)

    def _scaled(self, factor: float) -> float:
        """A compression factor on a log scale from 0 to 1, for the observation."""
        return float(np.log(factor) / np.log(self._largest_factor))


def keep_ratio(action: float, start: float | None = None) -> float:
    """An action in [-1, 1] as a keep ratio in [0.1, 1]; with a `start`, 0 is that keep ratio.

    Raises:
        ZooError: if it is not a number.
    """
    if np.isnan(action):
        raise ZooError("An action of nan is no keep ratio: the policy has diverged.")
    action = min(1.0, max(-1.0, action))
    if start is None:
        return FLOOR + (action + 1) / 2 * (1 - FLOOR)
    return start + abs(action) * ((1.0 if action > 0 else FLOOR) - start)


gymnasium.register(ENV_ID, entry_point="zoo.search.env:PruningEnv")
