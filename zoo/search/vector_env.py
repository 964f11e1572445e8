"""Many environments in lockstep, whose finished episodes are evaluated together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError, integer
from zoo.planning.solver import FLOOR
from zoo.search.env import PruningEnv, Rollout

try:
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError:
    raise ZooError("The search needs gymnasium: pip install 'prunezoo[search]'.") from None

__all__ = ["PruningVectorEnv", "play", "roll_out"]

Array = NDArray[np.float32]


class PruningVectorEnv(VectorEnv[Array, Array, NDArray[Any]]):
    """Environments in lockstep, whose finished episodes are evaluated by one call of `evaluate`.

    Episodes are numbered 0, 1, ... and number e plays entry e of the circular queue, however many
    are played together: the n-th episode of environment i has number n · num_envs + i.
    `reset(seed=s)` starts again at number s, `reset()` goes on to the next numbers.

    All episodes end at the same step, which returns the first observations of the next ones. Its
    infos hold `played`, the finished episodes as `PruningEnv` describes them, one dict per
    environment, and `final_obs`, their last observations.

    Args:
        make_env: makes an environment; all of them must be equal.
        num_envs: number of environments.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, make_env: Callable[[], PruningEnv], num_envs: int) -> None:
        self.num_envs = integer("num_envs", num_envs, 1)
        self.envs = tuple(make_env() for _ in range(self.num_envs))
        first = self.envs[0]
        self.tasks, self.groups, self.queue = first.tasks, first.groups, first.queue
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._next = 0

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> tuple[Array, dict[str, Any]]:
        """Begin the next episodes, or those from number `seed` on."""
        super().reset(seed=seed)
        self._next = self._next if seed is None else seed
        return self._begin(), {}

    def step(
        self, actions: Array
    ) -> tuple[Array, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Decide on the next group of every environment; `actions` has shape (num_envs, 1).

        Raises:
            ZooError: for another number of actions.
        """
        if np.size(actions) != self.num_envs:
            raise ZooError(
                f"actions must have shape {(self.num_envs, 1)}, got {np.shape(actions)}."
            )
        for env, action in zip(self.envs, np.reshape(actions, -1), strict=True):
            env.act(float(action))
        observations = self._observe()
        rewards, ended = np.zeros(self.num_envs), np.full(self.num_envs, self.envs[0].finished)
        infos: dict[str, Any] = {}
        if ended.all():
            episodes = self.envs[0].score([env.finish() for env in self.envs])
            rewards = np.array([episode["reward"] for episode in episodes])
            infos = {
                "played": np.array(episodes, dtype=object),
                "_played": ended,
                "final_obs": observations,
                "_final_obs": ended,
                "final_info": {},
                "_final_info": ended,
            }
            observations = self._begin()
        return observations, rewards, ended, np.zeros(self.num_envs, dtype=bool), infos

    def _begin(self) -> Array:
        for number, env in enumerate(self.envs, self._next):
            env.begin(number)
        self._next += self.num_envs
        return self._observe()

    def _observe(self) -> Array:
        return np.stack([env.observe() for env in self.envs])


def roll_out(env: PruningVectorEnv, betas: NDArray, entries: Sequence[int]) -> list[Rollout]:
    """The finished episodes of given keep ratios, not evaluated; nothing is observed.

    The running episodes of `env` are not disturbed. Arguments and errors are those of `play`.
    """
    betas = np.asarray(betas, dtype=float)
    expected = (len(entries), len(env.groups.sizes))
    if betas.shape != expected or np.isnan(betas).any():
        raise ZooError(f"betas must be numbers of shape {expected}, got shape {betas.shape}.")
    scratch, rollouts = copy(env.envs[0]), []
    for row, entry in zip(np.clip(betas, FLOOR, 1.0).tolist(), entries, strict=True):
        scratch.begin(entry)
        for beta in row:
            scratch.decide(beta)
        rollouts.append(scratch.finish())
    return rollouts


def play(env: PruningVectorEnv, betas: NDArray, entries: Sequence[int]) -> list[dict[str, Any]]:
    """The finished episodes of given keep ratios, evaluated together; nothing is observed.

    The running episodes of `env` are not disturbed.

    Args:
        env: gives the queue, the projection and the reward.
        betas: keep ratios, of shape (N, groups); clipped to [0.1, 1], as actions are.
        entries: per row, the index of the queue's entry that it is played on; N in all.

    Raises:
        ZooError: if `betas` has another shape, or holds NaN.
    """
    return env.envs[0].score(roll_out(env, betas, entries))
