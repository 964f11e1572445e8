"""Proximal policy optimisation, the paper's agent (section 4.2), from Stable-Baselines3."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zoo.errors import ZooError

try:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import DummyVecEnv
except ImportError:
    raise ZooError("PPO needs stable-baselines3: pip install 'prunezoo[search]'.") from None

__all__ = ["PPOSettings", "train_ppo"]

Policy = Callable[[NDArray], NDArray]


@dataclass(frozen=True)
class PPOSettings:
    """How PPO learns; rewards come once per episode, so neither γ nor λ discounts them."""

    episodes_per_update: int = 8
    """episodes per update; each update takes them as one batch"""
    epochs: int = 20
    """passes over that batch"""
    lr: float = 2e-3
    """learning rate"""
    clip: float = 0.2
    """largest relative change of an action's probability"""
    entropy: float = 0.0
    """weight of the entropy bonus"""
    max_grad_norm: float = 0.5
    """largest gradient norm"""
    std: float = 0.3
    """initial standard deviation of the actions, on [-1, 1]"""
    hidden: int = 64
    """units of each of the two tanh layers, of policy and value network alike"""


def train_ppo(
    make_env: Callable[[], Any],
    episodes: int,
    *,
    seed: int,
    on_episode: Callable[[dict[str, Any]], None],
    stop: Callable[[], bool] = lambda: False,
    settings: PPOSettings = PPOSettings(),
) -> Policy:
    """Learn for `episodes`, rounded up to whole updates, and return the policy's mean action.

    Args:
        make_env: makes an environment of fixed episode length whose observations are scaled.
        episodes: how many to play.
        seed: of the policy, its actions and the environment; the caller's random state is kept.
        on_episode: called with the last step's info of every episode.
        stop: asked after every episode; true ends the learning.
        settings: of PPO.

    Returns:
        observation -> action, deterministic. Ctrl-C ends learning early, with the policy so far.
    """
    with _random_state_kept():
        env = DummyVecEnv([make_env])
        steps = settings.episodes_per_update * len(env.get_attr("groups")[0].sizes)
        model = PPO(
            "MlpPolicy",
            env,
            learning_rate=settings.lr,
            n_steps=steps,
            batch_size=steps,
            n_epochs=settings.epochs,
            gamma=1.0,
            gae_lambda=1.0,
            clip_range=settings.clip,
            ent_coef=settings.entropy,
            max_grad_norm=settings.max_grad_norm,
            policy_kwargs={
                "net_arch": {"pi": [settings.hidden] * 2, "vf": [settings.hidden] * 2},
                "activation_fn": torch.nn.Tanh,
                "log_std_init": math.log(settings.std),
            },
            seed=seed,
            device="cpu",
        )
        model.set_logger(Logger(folder=None, output_formats=[]))  # the default one makes a folder
        updates = math.ceil(episodes / settings.episodes_per_update)
        with suppress(KeyboardInterrupt):
            model.learn(updates * steps, callback=_EpisodeCallback(on_episode, stop))
    return lambda observation: model.predict(observation, deterministic=True)[0]


class _EpisodeCallback(BaseCallback):
    def __init__(
        self, on_episode: Callable[[dict[str, Any]], None], stop: Callable[[], bool]
    ) -> None:
        super().__init__()
        self._on_episode, self._stop = on_episode, stop

    def _on_step(self) -> bool:
        if not self.locals["dones"][0]:
            return True
        self._on_episode(self.locals["infos"][0])
        return not self._stop()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Stable-Baselines3 seeds the global generators; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
