"""The agents of the search, by name; each is imported on demand."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError, unknown

if TYPE_CHECKING:
    from zoo.search.vector_env import PruningVectorEnv

__all__ = ["AGENTS", "SCREENED", "STARTING", "Episode", "agent", "check_cold"]

Episode = dict[str, Any]
"""The info of a finished episode, as `zoo.search.env.PruningEnv` describes it."""

AGENTS = {
    "ppo": "zoo.search.agents.ppo:train_ppo",
    "ddpg": "zoo.search.agents.ddpg:train_ddpg",
    "gnn": "zoo.search.agents.gnn:train_gnn",
    "random": "zoo.search.agents.ask_tell:train_random",
    "cma-es": "zoo.search.agents.ask_tell:train_cma_es",
    "genetic": "zoo.search.agents.ask_tell:train_genetic",
    "swarm": "zoo.search.agents.ask_tell:train_swarm",
    "annealing": "zoo.search.agents.ask_tell:train_annealing",
}

STARTING = ("ppo", "ddpg", "cma-es", "genetic", "swarm", "annealing")
"""Agents that can start from a profile: their actions are corrections of it, and begin near zero.
Random search has no start; GNN-RL's actions are relative to the dense network."""

SCREENED = ("random", "cma-es", "annealing")
"""Agents that can propose more candidates than are played, for a surrogate to choose from. Those
of pymoo and the networks that learn propose exactly what they play."""


def agent(name: str) -> Callable[..., list[Episode]]:
    """The training function of the agent `name`.

    It takes a `PruningVectorEnv`, a number of episodes, and as keywords `seed`, `on_episode`
    (called with every finished episode, in order), `stop` (called after every batch; true ends the
    training) and, if the agent has any, `settings`. It returns the episodes that the trained agent
    proposes, one per entry of the queue. Ctrl-C ends the training and keeps what was learnt.

    Raises:
        ZooError: for an unknown agent, or one whose library is not installed.
    """
    if name not in AGENTS:
        raise unknown("agent", name, AGENTS)
    module, function = AGENTS[name].split(":")
    return getattr(import_module(module), function)


def check_cold(name: str, env: PruningVectorEnv) -> None:
    """Refuse a queue with a start, for the agent `name` that cannot use it.

    Raises:
        ZooError: naming the agents that can.
    """
    if any(entry.start is not None for entry in env.queue):
        raise ZooError(f"{name} cannot start from a profile; these can: {', '.join(STARTING)}.")
