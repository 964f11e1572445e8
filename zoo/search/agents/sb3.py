"""What the agents of Stable-Baselines3 share; no other file imports that library."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from zoo.errors import ZooError
from zoo.search.agents import Episode
from zoo.search.vector_env import PruningVectorEnv

try:
    from stable_baselines3 import DDPG, PPO
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import NStepReplayBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.noise import ActionNoise
    from stable_baselines3.common.type_aliases import ReplayBufferSamples
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
except ImportError:
    raise ZooError("PPO and DDPG need stable-baselines3: pip install 'prunezoo[search]'.") from None

__all__ = [
    "DDPG",
    "PPO",
    "ActionNoise",
    "Lockstep",
    "NStepReplayBuffer",
    "ReplayBufferSamples",
    "VecEnv",
    "train",
    "train_alone",
]


class Lockstep(VecEnv):
    """A `PruningVectorEnv` in the interface of Stable-Baselines3."""

    def __init__(self, env: PruningVectorEnv) -> None:
        self.env, self.render_mode = env, None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> NDArray:
        """Begin at the first entry of the queue."""
        return self.env.reset(seed=0)[0]

    def step_async(self, actions: NDArray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[NDArray, NDArray, NDArray, list[dict[str, Any]]]:
        """Step all environments; at an episode's end, its info holds it as `episode_played`."""
        observations, rewards, dones, _, infos = self.env.step(self._actions)
        ends: list[dict[str, Any]] = [{} for _ in dones]
        if "played" in infos:
            ends = [
                {"episode_played": episode, "terminal_observation": last}
                for episode, last in zip(infos["played"], infos["final_obs"], strict=True)
            ]
        return observations, rewards, dones, ends

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:  # noqa: ARG002
        return [False] * len(list(self._get_indices(indices)))


def train(
    make_model: Callable[[Lockstep], BaseAlgorithm],
    env: PruningVectorEnv,
    episodes: int,
    on_episode: Callable[[Episode], None],
    stop: Callable[[], bool],
) -> list[Episode]:
    """Train for whole rounds of `env`, then play the policy's mean on every entry of the queue.

    The caller's random state is kept.
    """
    rounds, steps = math.ceil(episodes / env.num_envs), len(env.groups.sizes)
    with _random_state_kept():
        model = make_model(Lockstep(env))
        model.set_logger(Logger(folder=None, output_formats=[]))  # the default one makes a folder
        with suppress(KeyboardInterrupt):
            model.learn(rounds * steps * env.num_envs, callback=_EveryRound(on_episode, stop))
        return _proposals(model, env)


def _proposals(model: BaseAlgorithm, env: PruningVectorEnv) -> list[Episode]:
    found: list[Episode] = []
    observations, _ = env.reset(seed=0)
    while len(found) < len(env.queue):
        actions, _ = model.predict(observations, deterministic=True)
        observations, _, _, _, infos = env.step(actions)
        found.extend(infos.get("played", ()))
    return found[: len(env.queue)]


class _EveryRound(BaseCallback):
    """Reports the episodes of every round, and ends the training when `stop` says so."""

    def __init__(self, on_episode: Callable[[Episode], None], stop: Callable[[], bool]) -> None:
        super().__init__()
        self._on_episode, self._stop = on_episode, stop

    def _on_step(self) -> bool:
        if not self.locals["dones"][0]:
            return True
        for info in self.locals["infos"]:
            self._on_episode(info["episode_played"])
        return not self._stop()


def train_alone(
    make_model: Callable[[VecEnv], BaseAlgorithm],
    env: gymnasium.Env[NDArray, NDArray],
    episodes: int,
) -> None:
    """Train on one environment, whose episodes may differ in length.

    The round in which the last episode is played is finished. The caller's random state is kept.
    """
    with _random_state_kept():
        model = make_model(DummyVecEnv([lambda: env]))
        model.set_logger(Logger(folder=None, output_formats=[]))
        with suppress(KeyboardInterrupt):
            model.learn(10**12, callback=_WholeRounds(episodes))


class _WholeRounds(BaseCallback):
    """Ends the training after the round in which the last episode was played."""

    def __init__(self, episodes: int) -> None:
        super().__init__()
        self._episodes, self._played = episodes, 0

    def _on_rollout_start(self) -> None:
        self._over = self._played >= self._episodes

    def _on_step(self) -> bool:
        self._played += int(self.locals["dones"][0])
        return not self._over


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the global random generators afterwards, because Stable-Baselines3 seeds them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
