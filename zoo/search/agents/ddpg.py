"""Deep deterministic policy gradient, the agent of AMC (He et al., 2018), by Stable-Baselines3.

As in AMC, actions are random at first, then noisy; the noise fades from episode to episode, and
rewards are learnt relative to a baseline. It differs from AMC in four ways: noisy actions are
clipped to their range, not drawn from a truncated normal; the critic learns a decision's value from
the reward of its episode, not from its own estimate of the next decision, so target networks play
no part; rewards are also divided by their standard deviation; and weights decay. Without any of the
last three it proposes worse profiles after a few hundred episodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from zoo.search.agents import Episode
from zoo.search.agents.sb3 import (
    DDPG,
    ActionNoise,
    Lockstep,
    NStepReplayBuffer,
    ReplayBufferSamples,
    train,
)
from zoo.search.vector_env import PruningVectorEnv

__all__ = ["DDPGSettings", "train_ddpg"]


@dataclass(frozen=True)
class DDPGSettings:
    """How DDPG explores and learns."""

    warmup: int = 80
    """number of first episodes with random actions, in whole rounds; noise is added to these too.
    A search that starts from a profile has none"""
    updates: int = 50
    """updates after every round"""
    batch_size: int = 128
    """decisions per update, from all episodes so far"""
    lr: float = 1e-3
    """learning rate of actor and critic"""
    weight_decay: float = 1.0
    """of both, times the learning rate; without it actions stick at the ends of their range"""
    std: float = 0.5
    """initial standard deviation of the noise, on actions in [-1, 1]"""
    fading: float = 0.98
    """factor on an environment's noise for each of its episodes past the warm-up"""
    hidden: int = 64
    """units of each of the two layers, of actor and critic alike"""


def train_ddpg(
    env: PruningVectorEnv,
    episodes: int,
    *,
    seed: int,
    on_episode: Callable[[Episode], None],
    stop: Callable[[], bool] = lambda: False,
    settings: DDPGSettings = DDPGSettings(),
) -> list[Episode]:
    """Train for `episodes` episodes, then play the actor's actions without noise.

    Args:
        env: environments in lockstep.
        episodes: how many to play, rounded up to whole rounds of `env`.
        seed: of the networks and the actions; the caller's random state is kept.
        on_episode: called with every finished episode, in order.
        stop: called after every round; true ends the training, as Ctrl-C does.
        settings: settings of DDPG.

    Returns:
        One episode of the deterministic policy per entry of the queue.
    """
    warmup = settings.warmup if env.queue[0].start is None else 0
    steps, rounds = len(env.groups.sizes), math.ceil(warmup / env.num_envs)

    def make_model(lockstep: Lockstep) -> DDPG:
        return DDPG(
            "MlpPolicy",
            lockstep,
            learning_rate=settings.lr,
            buffer_size=(episodes + env.num_envs) * steps,
            learning_starts=rounds * steps * env.num_envs - 1,
            batch_size=settings.batch_size,
            gamma=1.0,
            train_freq=(steps, "step"),
            gradient_steps=settings.updates,
            action_noise=_Fading(settings.std, settings.fading, rounds),
            replay_buffer_class=_Standardised,
            replay_buffer_kwargs={"n_steps": steps, "gamma": 1.0},
            policy_kwargs={
                "net_arch": [settings.hidden] * 2,
                "optimizer_class": torch.optim.AdamW,
                "optimizer_kwargs": {"weight_decay": settings.weight_decay},
            },
            seed=seed,
            device="cpu",
        )

    return train(make_model, env, episodes, on_episode, stop)


class _Fading(ActionNoise):
    """Normal noise, whose standard deviation shrinks with every episode past the warm-up."""

    def __init__(self, std: float, fading: float, warmup: int) -> None:
        super().__init__()
        self._std, self._fading, self._warmup = std, fading, warmup

    def __call__(self) -> NDArray:
        return np.random.normal(0.0, self._std, 1)

    def reset(self) -> None:
        self._warmup -= 1
        if self._warmup < 0:
            self._std *= self._fading


class _Standardised(NStepReplayBuffer):
    """A replay buffer of decisions with their episode's reward, standardised over all episodes."""

    def _get_samples(self, *args, **options) -> ReplayBufferSamples:
        samples = super()._get_samples(*args, **options)
        rewards = self.rewards[self.dones > 0]
        scaled = (samples.rewards - float(rewards.mean())) / (float(rewards.std()) + 1e-8)
        return samples._replace(rewards=scaled)
