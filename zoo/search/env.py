"""The paper's Markov decision process (section 4.1) as a gymnasium environment.

Importing this module registers `zoo/Pruning-v0`, so that

    gymnasium.make("zoo.search.env:zoo/Pruning-v0", tasks=..., groups=..., cf=4, evaluate=...)

makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.cost import cost_model
from zoo.errors import ZooError, unknown
from zoo.groups import ChannelGroups
from zoo.pruning.criteria import random_scores
from zoo.search.evaluation import SEARCH_SEEDS, Task, check_tasks
from zoo.search.observation import describe, length, observe, summarise
from zoo.search.reward import gaussian
from zoo.solver import FLOOR, round_widths, scale_curve, solve

try:
    import gymnasium
except ImportError:
    raise ZooError("The search needs gymnasium: pip install 'prunezoo[search]'.") from None

__all__ = ["ENV_ID", "PROJECTIONS", "PruningEnv", "keep_ratio"]

ENV_ID = "zoo/Pruning-v0"
PROJECTIONS = ("none", "scale")

Evaluate = Callable[[Task, Sequence[int], int], float]


class PruningEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One step per channel group, one profile per episode, one task per episode.

    An action in [-1, 1] is the keep ratio β of the group at hand, rescaled to [0.1, 1] (paper,
    section 8.2); later groups are whole. The reward is 0 but at the end of an episode, where it is
    `zoo.search.reward.gaussian` of the finished network. `zoo.search.observation` says what the
    agent sees; features are `static`: the dense network's, masked by what the episode kept.

    The tasks are a circular queue: `reset(seed=s)` rewinds it to task s modulo its length,
    `reset()` advances to the next. Each task has one random choice of channels, the same in all its
    episodes: what differs between two rewards is the profile, not the luck of the draw.

    The last step's `info` holds the episode: `task` (name), `channel_seed`, `actions` (β as the
    agent chose them), `widths`, `keep_ratios`, `factor`, `accuracy` and `reward`.

    Args:
        tasks: of one architecture.
        groups: of the reference network, whose factor is `cf`; the costs are its costs.
        cf: the compression factor asked for.
        evaluate: (task, widths, channel seed) -> validation accuracy in [0, 1].
        metric: `params` or `macs`.
        projection: `scale` meets `cf` exactly, by one common scale of all β after the last action;
            `none` takes the actions as they are.
        sigma: of the reward, in units of the factor; 0.1 · cf by default.

    Raises:
        FactorError: if no keep ratios of at least 0.1 reach `cf`, naming the reachable range.
        ZooError: for no tasks, tasks of different architectures or an unknown projection.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        tasks: Sequence[Task],
        groups: ChannelGroups,
        cf: float,
        evaluate: Evaluate,
        metric: str = "params",
        projection: Literal["none", "scale"] = "scale",
        sigma: float | None = None,
    ) -> None:
        check_tasks(tasks)
        if tasks[0].groups.names != groups.names or tasks[0].groups.sizes != groups.sizes:
            raise ZooError(f"The task {tasks[0].name} does not have the reference's groups.")
        if projection not in PROJECTIONS:
            raise unknown("projection", projection, PROJECTIONS)
        self.tasks, self.groups, self.evaluate = tuple(tasks), groups, evaluate
        self.cf, self.metric, self.projection, self.sigma = cf, metric, projection, sigma
        self.model = cost_model(groups)
        sizes = groups.sizes
        solve(self.model, scale_curve([1.0] * len(sizes)), cf, metric)
        self._largest_factor = self.model.factor(round_widths(sizes, [FLOOR] * len(sizes)), metric)
        self._descriptors = describe(self.model)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (length(len(sizes)),), np.float32)
        self._position = -1
        self._betas: list[float] = []

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode on the next task of the queue, or on the one that `seed` fixes."""
        super().reset(seed=seed)
        self._position = (self._position + 1 if seed is None else seed) % len(self.tasks)
        self._betas = []
        self._channel_seed = SEARCH_SEEDS[0] + self._position
        self._scores = [np.array(s) for s in random_scores(self.groups, self._channel_seed)]
        return self._observation(), {"task": self.task.name}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Keep the share of the next group's channels that `action`, of shape (1,), asks for."""
        self._betas.append(keep_ratio(float(np.asarray(action).item())))
        if len(self._betas) < len(self.groups.sizes):
            return self._observation(), 0.0, False, False, {}
        observation, info = self._observation(), self._finish()
        return observation, info["reward"], True, False, info

    @property
    def task(self) -> Task:
        """The task of the running episode."""
        return self.tasks[self._position]

    def _finish(self) -> dict[str, Any]:
        sizes = self.groups.sizes
        if self.projection == "scale":
            solution = solve(self.model, scale_curve(self._betas), self.cf, self.metric)
            widths, ratios = solution.widths, solution.keep_ratios
        else:
            widths, ratios = round_widths(sizes, self._betas), tuple(self._betas)
        factor = self.model.factor(widths, self.metric)
        accuracy = self.evaluate(self.task, widths, self._channel_seed)
        return {
            "task": self.task.name,
            "channel_seed": self._channel_seed,
            "actions": tuple(self._betas),
            "widths": widths,
            "keep_ratios": ratios,
            "factor": factor,
            "accuracy": accuracy,
            "reward": gaussian(accuracy, self.task.base_accuracy, factor, self.cf, self.sigma),
        }

    def _observation(self) -> NDArray[np.float32]:
        step, sizes = len(self._betas), self.groups.sizes
        betas = self._betas + [1.0] * (len(sizes) - step)
        widths = round_widths(sizes, betas)
        previous = (step - 1) % len(sizes)
        order = np.argsort(-self._scores[previous], kind="stable")
        kept = np.zeros(sizes[previous], dtype=bool)
        kept[order[: widths[previous]]] = True
        summary = summarise(self.task.features, previous, kept)
        factor = self.model.factor(widths, self.metric)
        compression = np.log(factor) / np.log(self._largest_factor)
        return observe(self._descriptors, step, summary, compression, betas[previous])


def keep_ratio(action: float) -> float:
    """An action in [-1, 1] as a keep ratio in [0.1, 1]."""
    return FLOOR + (min(1.0, max(-1.0, action)) + 1) / 2 * (1 - FLOOR)


gymnasium.register(ENV_ID, entry_point="zoo.search.env:PruningEnv")
