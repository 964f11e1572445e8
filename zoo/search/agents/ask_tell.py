"""Ask-and-tell searches: a method proposes keep ratios and is told rewards. No network learns.

Nothing is observed. A candidate is one keep ratio per channel group. It is played on every task,
always with the same channels; the method is told the mean reward. Methods: random draws, CMA-ES
(Hansen, arXiv:1604.00772, from `cmaes`), a genetic algorithm and a particle swarm (from `pymoo`),
and simulated annealing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from statistics import fmean
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError
from zoo.planning.solver import FLOOR
from zoo.search.agents import Episode
from zoo.search.vector_env import PruningVectorEnv, play

__all__ = [
    "Method",
    "train_annealing",
    "train_cma_es",
    "train_genetic",
    "train_random",
    "train_swarm",
]

BATCH = 8
"""Candidates per batch; the genetic algorithm's first batch is its population, twice as many."""

RANDOM = (0.3, 0.9)
"""Range of the keep ratios of random profiles (paper, section 3)."""


class Method(Protocol):
    """A search method: it is asked for keep ratios, then told their rewards; more is better."""

    def ask(self) -> NDArray:
        """Candidates, of shape (batch, groups), in [`FLOOR`, 1]."""

    def tell(self, rewards: NDArray) -> None:
        """The rewards of the candidates that were asked for last, in their order."""


class _Random:
    def __init__(self, groups: int, seed: int) -> None:
        self._groups, self._rng = groups, np.random.default_rng(seed)

    def ask(self) -> NDArray:
        return self._rng.uniform(*RANDOM, (BATCH, self._groups))

    def tell(self, rewards: NDArray) -> None:
        pass


class _CMA:
    def __init__(self, groups: int, seed: int) -> None:
        try:
            from cmaes import CMA
        except ImportError:
            raise ZooError("CMA-ES needs cmaes: pip install 'prunezoo[search]'.") from None
        self._cma = CMA(
            mean=np.full(groups, sum(RANDOM) / 2),
            sigma=(1 - FLOOR) / 4,
            bounds=np.array([[FLOOR, 1.0]] * groups),
            seed=seed,
            population_size=BATCH,
        )

    def ask(self) -> NDArray:
        self._asked = np.array([self._cma.ask() for _ in range(BATCH)])
        return self._asked

    def tell(self, rewards: NDArray) -> None:
        self._cma.tell([(x, -reward) for x, reward in zip(self._asked, rewards, strict=True)])


class _Pymoo:
    """An algorithm of pymoo, which minimises: rewards are negated."""

    def __init__(self, algorithm: Any, groups: int, seed: int) -> None:
        from pymoo.core.problem import Problem

        self._algorithm = algorithm
        self._algorithm.setup(Problem(n_var=groups, n_obj=1, xl=FLOOR, xu=1.0), seed=seed)

    def ask(self) -> NDArray:
        self._asked = self._algorithm.ask()
        return self._asked.get("X")

    def tell(self, rewards: NDArray) -> None:
        self._asked.set("F", -rewards[:, None])
        self._algorithm.tell(infills=self._asked)


def _genetic(groups: int, seed: int) -> Method:
    try:
        from pymoo.algorithms.soo.nonconvex.ga import GA
    except ImportError:
        raise ZooError("genetic needs pymoo: pip install 'prunezoo[search]'.") from None
    return _Pymoo(GA(pop_size=2 * BATCH, n_offsprings=BATCH), groups, seed)


def _swarm(groups: int, seed: int) -> Method:
    try:
        from pymoo.algorithms.soo.nonconvex.pso import PSO
    except ImportError:
        raise ZooError("swarm needs pymoo: pip install 'prunezoo[search]'.") from None
    return _Pymoo(PSO(pop_size=BATCH), groups, seed)


class _Annealing:
    """Metropolis's rule at a temperature that falls with 1 / batches (Szu and Hartley, 1987).

    A batch is proposed around one state, and its candidates are accepted or not one by one. No
    library: scipy's `dual_annealing` calls the function itself, on one candidate at a time.
    """

    def __init__(self, groups: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._state, self._reward = self._rng.uniform(*RANDOM, groups), -np.inf
        self._batch = 0

    def ask(self) -> NDArray:
        self._batch += 1
        step = 0.25 / self._batch**0.3
        moves = self._rng.normal(0, step, (BATCH, len(self._state)))
        self._asked = np.clip(self._state + moves, FLOOR, 1.0)
        return self._asked

    def tell(self, rewards: NDArray) -> None:
        temperature = 0.05 / self._batch
        for candidate, reward in zip(self._asked, rewards, strict=True):
            if self._rng.random() < np.exp(min(0.0, (reward - self._reward) / temperature)):
                self._state, self._reward = candidate, reward


@dataclass
class _Search:
    """The search at one asked factor."""

    method: Method
    entries: list[int]
    """indices of the queue's entries at this factor"""
    left: int
    """candidates still to be played"""
    best: list[Episode] = field(default_factory=list)
    """episodes of the candidate with the best mean reward, one per entry"""

    def play(self, env: PruningVectorEnv) -> list[Episode]:
        """Play the next batch, tell the method its rewards, and return the episodes."""
        asked = self.method.ask()
        batch, per = asked[: self.left], len(self.entries)
        played = play(env, np.repeat(batch, per, axis=0), self.entries * len(batch))
        candidates = [played[at : at + per] for at in range(0, len(played), per)]
        self.best = max([self.best, *candidates] if self.best else candidates, key=_mean)
        self.left -= len(batch)
        if len(batch) == len(asked):
            self.method.tell(np.array([_mean(episodes) for episodes in candidates]))
        return played


def _mean(episodes: Sequence[Episode]) -> float:
    return fmean(episode["reward"] for episode in episodes)


def _train(
    make_method: Callable[[int, int], Method],
    env: PruningVectorEnv,
    episodes: int,
    *,
    seed: int,
    on_episode: Callable[[Episode], None],
    stop: Callable[[], bool] = lambda: False,
) -> list[Episode]:
    """Search for `episodes` episodes, rounded down to whole candidates, at least one.

    Args:
        make_method: makes a method from a number of groups and a seed.
        env: environments in lockstep; only their queue, projection and reward are used. Every
            factor of the queue has a search of its own.
        episodes: how many to play; a candidate takes one per task.
        seed: of the method.
        on_episode: called with every finished episode, in order.
        stop: called after every batch; true ends the search, as Ctrl-C does.

    Returns:
        The episodes of the best candidate, one per entry of the queue; fewer if the search is
        interrupted before every factor had a batch.
    """
    candidates = max(1, episodes // len(env.queue))
    searches = []
    for cf in dict.fromkeys(entry.cf for entry in env.queue):
        entries = [number for number, entry in enumerate(env.queue) if entry.cf == cf]
        method = make_method(len(env.groups.sizes), seed)
        searches.append(_Search(method, entries, candidates))
    with suppress(KeyboardInterrupt):
        for search in cycle(searches):
            if not search.left:  # searches take turns with equal batches: all are done
                break
            for episode in search.play(env):
                on_episode(episode)
            if stop():
                break
    best = {number: e for s in searches for number, e in zip(s.entries, s.best, strict=False)}
    return [best[number] for number in sorted(best)]


train_random = partial(_train, _Random)
train_cma_es = partial(_train, _CMA)
train_genetic = partial(_train, _genetic)
train_swarm = partial(_train, _swarm)
train_annealing = partial(_train, _Annealing)
