"""GNN-RL: PPO on the network's computational graph, which is rebuilt after every step.

An episode begins with the dense network. A step chooses the keep ratios of all groups at once,
relative to their present widths; the next state is the graph of the network pruned that far. The
episode ends when the network meets the constraint on its cost. The reward is the same as for all
agents. A multi-stage graph encoder reads the state.

Differences from the paper:

- The graph is built from the stored channel groups and their cost terms
  (`zoo.search.agents.graphs`): nothing is traced. Its nodes are channel groups, so feature maps
  that are added share one node, and batch norms and activations have none. The hierarchy has two
  stages: feature maps, and their resolutions.
- The step that meets the constraint may overshoot it. The environment's projection then scales all
  keep ratios to the asked factor, as it does for every agent, so that candidates are comparable.
- An episode that has not met the constraint after `max_steps` steps ends as well.
- The standard deviation of the actions is learnt; the paper fixes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Normal

from zoo.common.seeding import seeded
from zoo.planning.solver import FLOOR, round_widths
from zoo.search.agents import Episode, check_cold
from zoo.search.agents.graphs import NODE_FEATURES, OPERATION_FEATURES, Architecture, Graphs
from zoo.search.vector_env import PruningVectorEnv, play

__all__ = ["Actor", "Critic", "GNNSettings", "GraphEncoder", "train_gnn"]


@dataclass(frozen=True)
class GNNSettings:
    """How GNN-RL acts and learns."""

    max_steps: int = 8
    """most steps of an episode"""
    least: float = 0.5
    """smallest keep ratio of one step, relative to the present width"""
    epochs: int = 20
    """passes over the episodes of a batch"""
    lr: float = 2e-3
    """learning rate"""
    clip: float = 0.2
    """largest relative change of an action's probability"""
    max_grad_norm: float = 0.5
    """largest gradient norm"""
    std: float = 0.3
    """initial standard deviation of the actions, on [-1, 1]"""


class GraphEncoder(nn.Module):
    """Multi-stage graph encoder: `Graphs` -> embeddings of shape (B, embedding).

    Operations carry messages between the feature maps, then between the stages that the maps are
    pooled into. The embedding is read from the mean of the stages.
    """

    def __init__(self, hidden: int = 32, embedding: int = 64) -> None:
        super().__init__()
        self.node = nn.Linear(NODE_FEATURES, hidden)
        self.operation = nn.Linear(OPERATION_FEATURES, hidden)
        self.fine, self.coarse = _Messages(hidden), _Messages(hidden)
        self.readout = nn.Linear(hidden, embedding)

    def forward(self, graphs: Graphs) -> Tensor:
        operations = self.operation(graphs.operations).tanh()
        maps = self.node(graphs.nodes).tanh()
        maps = self.fine(maps, operations, graphs.source, graphs.target)
        stages = _pool(maps, graphs.stage)
        ends = graphs.stage[graphs.source], graphs.stage[graphs.target]
        stages = self.coarse(stages, operations, *ends)
        return self.readout(stages.mean(1)).tanh()


class _Messages(nn.Module):
    """Two rounds of message passing along the operations, in both directions."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rounds = nn.ModuleList(nn.Linear(3 * hidden, hidden) for _ in range(2))

    def forward(self, nodes: Tensor, operations: Tensor, source: Tensor, target: Tensor) -> Tensor:
        for layer in self.rounds:
            forth, back = nodes[:, source] + operations, nodes[:, target] + operations
            heard = [
                torch.zeros_like(nodes).index_add(1, target, forth),
                torch.zeros_like(nodes).index_add(1, source, back),
            ]
            nodes = layer(torch.cat([nodes, *heard], -1)).tanh()
        return nodes


def _pool(maps: Tensor, stage: Tensor) -> Tensor:
    """The mean of the maps of every stage."""
    counts = torch.bincount(stage)
    empty = maps.new_zeros(len(maps), len(counts), maps.shape[-1])
    return empty.index_add(1, stage, maps) / counts[:, None]


class Actor(nn.Module):
    """`Graphs` -> mean actions of shape (B, groups), in [-1, 1]."""

    def __init__(self, groups: int, hidden: int = 64, embedding: int = 64) -> None:
        super().__init__()
        self.encoder = GraphEncoder(embedding=embedding)
        self.head = nn.Sequential(
            nn.Linear(embedding, hidden), nn.ReLU(), nn.Linear(hidden, groups), nn.Tanh()
        )

    def forward(self, graphs: Graphs) -> Tensor:
        return self.head(self.encoder(graphs))


class Critic(nn.Module):
    """`Graphs` -> values of shape (B,)."""

    def __init__(self, embedding: int = 64) -> None:
        super().__init__()
        self.encoder = GraphEncoder(embedding=embedding)
        self.head = nn.Linear(embedding, 1)

    def forward(self, graphs: Graphs) -> Tensor:
        return self.head(self.encoder(graphs)).squeeze(-1)


def train_gnn(
    env: PruningVectorEnv,
    episodes: int,
    *,
    seed: int,
    on_episode: Callable[[Episode], None],
    stop: Callable[[], bool] = lambda: False,
    settings: GNNSettings = GNNSettings(),
    actor: nn.Module | None = None,
    critic: nn.Module | None = None,
) -> list[Episode]:
    """Train for `episodes` episodes, then play the actor's mean actions.

    Every round of `env.num_envs` episodes is evaluated together and gives one update.

    Args:
        env: environments in lockstep; only their queue, projection and reward are used.
        episodes: how many to play, rounded up to whole rounds.
        seed: of the networks and the actions; the caller's random state is kept.
        on_episode: called with every finished episode, in order.
        stop: called after every round; true ends the training, as Ctrl-C does.
        settings: settings of the agent.
        actor: `Graphs` -> mean actions of shape (B, groups), in [-1, 1]; `Actor` by default. It is
            trained in place.
        critic: `Graphs` -> values of shape (B,); `Critic` by default. It is trained in place.

    Returns:
        One episode of the deterministic policy per entry of the queue.

    Raises:
        ZooError: for a queue with a start.
    """
    check_cold("gnn", env)
    with seeded(seed):
        groups = len(env.groups.sizes)
        agent = _Agent(env, settings, actor or Actor(groups), critic or Critic())
        with suppress(KeyboardInterrupt):
            for first in range(0, episodes, env.num_envs):
                entries = [(first + i) % len(env.queue) for i in range(env.num_envs)]
                rollouts = agent.roll_out(entries)
                found = play(env, rollouts.keep_ratios, entries)
                for episode in found:
                    on_episode(episode)
                if stop():
                    break
                agent.update(rollouts, [episode["reward"] for episode in found])
        entries = list(range(len(env.queue)))
        return play(env, agent.roll_out(entries, greedy=True).keep_ratios, entries)


@dataclass(frozen=True)
class _Rollouts:
    """Several episodes: their final keep ratios, and all their steps."""

    keep_ratios: NDArray
    """(episodes, groups): at the end of each episode"""
    graphs: Graphs
    """the states of all steps"""
    actions: Tensor
    """(steps, groups)"""
    episode: NDArray
    """(steps,): which episode a step belongs to"""


class _Agent:
    def __init__(
        self, env: PruningVectorEnv, settings: GNNSettings, actor: nn.Module, critic: nn.Module
    ) -> None:
        self._env, self._settings = env, settings
        self._actor, self._critic = actor, critic
        self._architecture = Architecture(env.groups)
        self._log_std = nn.Parameter(torch.full((len(env.groups.sizes),), math.log(settings.std)))
        self._parameters = [*actor.parameters(), *critic.parameters(), self._log_std]
        self._adam = torch.optim.Adam(self._parameters, settings.lr)

    @torch.no_grad()
    def roll_out(self, entries: Sequence[int], *, greedy: bool = False) -> _Rollouts:
        """Play one episode per entry in lockstep; with the policy's mean actions if `greedy`."""
        least = self._settings.least
        asked = np.array([self._env.queue[entry].cf for entry in entries])
        keep_ratios = np.ones((len(entries), len(self._env.groups.sizes)))
        running = np.arange(len(entries))
        steps: list[tuple[NDArray, NDArray, Tensor, NDArray]] = []
        while len(running) and len(steps) < self._settings.max_steps:
            state = keep_ratios[running], self._to_come(keep_ratios[running], asked[running])
            policy = self._policy(self._architecture(*state))
            actions = policy.mean if greedy else policy.sample()
            steps.append((*state, actions, running))
            kept = least + (actions.clamp(-1, 1).double().numpy() + 1) / 2 * (1 - least)
            keep_ratios[running] = np.maximum(FLOOR, keep_ratios[running] * kept)
            running = running[self._to_come(keep_ratios[running], asked[running]) > 0]
        states, to_come, taken, episode = zip(*steps, strict=True)
        graphs = self._architecture(np.concatenate(states), np.concatenate(to_come))
        return _Rollouts(keep_ratios, graphs, torch.cat(taken), np.concatenate(episode))

    def update(self, rollouts: _Rollouts, rewards: Sequence[float]) -> None:
        """One PPO update (Schulman et al., arXiv:1707.06347), without discounting."""
        returns = torch.tensor(rewards, dtype=torch.float32)[rollouts.episode]
        with torch.no_grad():
            before = self._log_probability(rollouts)
            advantages = returns - self._critic(rollouts.graphs)
            advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        clip = self._settings.clip
        for _ in range(self._settings.epochs):
            ratio = (self._log_probability(rollouts) - before).exp()
            clipped = ratio.clamp(1 - clip, 1 + clip)
            gain = torch.min(ratio * advantages, clipped * advantages).mean()
            error = (self._critic(rollouts.graphs) - returns).square().mean()
            self._adam.zero_grad()
            (error / 2 - gain).backward()
            nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
            self._adam.step()

    def _policy(self, graphs: Graphs) -> Normal:
        return Normal(self._actor(graphs), self._log_std.exp())

    def _log_probability(self, rollouts: _Rollouts) -> Tensor:
        return self._policy(rollouts.graphs).log_prob(rollouts.actions).sum(-1)

    def _to_come(self, keep_ratios: NDArray, asked: NDArray) -> NDArray:
        """log(asked factor / present factor), shape (episodes,): the compression still missing."""
        cost, metric = self._env.envs[0].cost, self._env.envs[0].settings.metric
        widths = [round_widths(cost.sizes, row) for row in keep_ratios.tolist()]
        return np.log(asked) - np.log([cost.factor(row, metric) for row in widths])
