"""The agents of the search, by name; each is imported on demand."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from zoo.errors import unknown

__all__ = ["AGENTS", "Episode", "agent"]

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
