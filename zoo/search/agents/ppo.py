"""Proximal policy optimisation, the paper's agent (section 4.2), from Stable-Baselines3."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
from numpy.typing import NDArray
from torch import nn

from zoo.search.agents import Episode
from zoo.search.agents.sb3 import PPO, Lockstep, VecEnv, train, train_alone
from zoo.search.vector_env import PruningVectorEnv

__all__ = ["PPOSettings", "train_corrections", "train_ppo"]


@dataclass(frozen=True)
class PPOSettings:
    """How PPO learns; there is one reward per episode, so γ and λ are 1."""

    epochs: int = 20
    """passes over the episodes of a round, which are one batch"""
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
    target_kl: float | None = None
    """KL divergence from the last round's policy at which a round's passes end; None for no end"""


def train_ppo(
    env: PruningVectorEnv,
    episodes: int,
    *,
    seed: int,
    on_episode: Callable[[Episode], None],
    stop: Callable[[], bool] = lambda: False,
    settings: PPOSettings = PPOSettings(),
) -> list[Episode]:
    """Train for `episodes` episodes, then play the policy's mean actions.

    Every round of `env` gives one update: with eight environments, from eight episodes.

    Args:
        env: environments in lockstep.
        episodes: how many to play, rounded up to whole rounds.
        seed: of the policy and its actions; the caller's random state is kept.
        on_episode: called with every finished episode, in order.
        stop: called after every round; true ends the training, as Ctrl-C does.
        settings: settings of PPO.

    Returns:
        One episode of the deterministic policy per entry of the queue.
    """
    steps = len(env.groups.sizes)

    def make_model(lockstep: Lockstep) -> PPO:
        return _ppo(lockstep, steps, settings, seed)

    return train(make_model, env, episodes, on_episode, stop)


def train_corrections(
    env: gymnasium.Env[NDArray, NDArray],
    episodes: int,
    *,
    steps: int,
    seed: int,
    settings: PPOSettings,
) -> list[nn.Linear]:
    """Train on one environment, whose episodes may differ in length; the first mean action is zero.

    Args:
        env: the environment; one reward per episode.
        episodes: how many to play; the round that has begun is finished.
        steps: decisions between two updates.
        seed: of the policy and its actions; the caller's random state is kept.
        settings: settings of PPO.

    Returns:
        The linear layers of the policy, with a tanh between each two.
    """
    layers: list[nn.Linear] = []

    def make_model(alone: VecEnv) -> PPO:
        model = _ppo(alone, steps, settings, seed)
        policy: Any = model.policy
        nn.init.zeros_(policy.action_net.weight)
        nn.init.zeros_(policy.action_net.bias)
        every = (*policy.mlp_extractor.policy_net, policy.action_net)
        layers.extend(layer for layer in every if isinstance(layer, nn.Linear))
        return model

    train_alone(make_model, env, episodes)
    return layers


def _ppo(env: VecEnv, steps: int, settings: PPOSettings, seed: int) -> PPO:
    """The agent; a round, which is one batch, has `steps` decisions in every environment."""
    return PPO(
        "MlpPolicy",
        env,
        learning_rate=settings.lr,
        n_steps=steps,
        batch_size=steps * env.num_envs,
        n_epochs=settings.epochs,
        gamma=1.0,
        gae_lambda=1.0,
        clip_range=settings.clip,
        ent_coef=settings.entropy,
        max_grad_norm=settings.max_grad_norm,
        target_kl=settings.target_kl,
        policy_kwargs={
            "net_arch": {"pi": [settings.hidden] * 2, "vf": [settings.hidden] * 2},
            "activation_fn": nn.Tanh,
            "log_std_init": math.log(settings.std),
        },
        seed=seed,
        device="cpu",
    )
