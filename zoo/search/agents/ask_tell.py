"""Ask-and-tell searches: a method proposes keep ratios and is told rewards. No network learns.

Nothing is observed. A candidate is one keep ratio per channel group. It is played on every task,
always with the same channels; the method is told the mean reward. Methods: random draws, CMA-ES
(Hansen, arXiv:1604.00772, from `cmaes`), a genetic algorithm and a particle swarm (from `pymoo`),
and simulated annealing.

Where the queue has a start, a method proposes actions instead, corrections of the start as in
`zoo.search.env`. The first candidate is the start itself, the others of its batch are near it.
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
from zoo.search.agents import Episode, check_cold
from zoo.search.env import keep_ratio
from zoo.search.surrogate import ENOUGH, best_of
from zoo.search.vector_env import PruningVectorEnv, play, roll_out

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


@dataclass(frozen=True)
class Box:
    """What a method searches: vectors of `groups` numbers in [`low`, `high`].

    Attributes:
        warm: whether they are actions, and zero is the profile to start from; else keep ratios.
    """

    groups: int
    low: float = FLOOR
    high: float = 1.0
    warm: bool = False

    @classmethod
    def of(cls, env: PruningVectorEnv) -> Box:
        groups = len(env.groups.sizes)
        return cls(groups) if env.queue[0].start is None else cls(groups, -1.0, 1.0, warm=True)

    @property
    def sigma(self) -> float:
        """Standard deviation of a first batch: a quarter of the range, half of that if warm."""
        return (self.high - self.low) / (8 if self.warm else 4)

    def near_start(self, count: int, rng: np.random.Generator) -> NDArray:
        """A first batch of a warm search: zero, then normal draws around it."""
        drawn = rng.normal(0, self.sigma, (count, self.groups))
        drawn[0] = 0
        return np.clip(drawn, self.low, self.high)


class Method(Protocol):
    """A search method: it is asked for keep ratios, then told their rewards; more is better."""

    def ask(self, count: int = BATCH) -> NDArray:
        """Candidates, of shape (count, groups), in the method's `Box`; pymoo's choose `count`."""

    def tell(self, asked: NDArray, rewards: NDArray) -> None:
        """The candidates of the last call of `ask` that were measured, and their rewards."""


class _Random:
    def __init__(self, box: Box, seed: int) -> None:
        self._groups, self._rng = box.groups, np.random.default_rng(seed)

    def ask(self, count: int = BATCH) -> NDArray:
        return self._rng.uniform(*RANDOM, (count, self._groups))

    def tell(self, asked: NDArray, rewards: NDArray) -> None:
        pass


class _CMA:
    def __init__(self, box: Box, seed: int) -> None:
        try:
            from cmaes import CMA
        except ImportError:
            raise ZooError("CMA-ES needs cmaes: pip install 'prunezoo[search]'.") from None
        self._cma = CMA(
            mean=np.full(box.groups, 0.0 if box.warm else sum(RANDOM) / 2),
            sigma=box.sigma,
            bounds=np.array([[box.low, box.high]] * box.groups),
            seed=seed,
            population_size=BATCH,
        )
        self._at_start = box.warm

    def ask(self, count: int = BATCH) -> NDArray:
        asked = np.array([self._cma.ask() for _ in range(count)])
        if self._at_start:
            asked[0], self._at_start = 0.0, False
        return asked

    def tell(self, asked: NDArray, rewards: NDArray) -> None:
        self._cma.tell([(x, -reward) for x, reward in zip(asked, rewards, strict=True)])


class _Pymoo:
    """An algorithm of pymoo, which minimises: rewards are negated."""

    def __init__(self, make: Any, population: int, box: Box, seed: int) -> None:
        from pymoo.core.problem import Problem

        first = {}
        if box.warm:
            first = {"sampling": box.near_start(population, np.random.default_rng(seed))}
        self._algorithm = make(pop_size=population, **first)
        problem = Problem(n_var=box.groups, n_obj=1, xl=box.low, xu=box.high)
        self._algorithm.setup(problem, seed=seed)

    def ask(self, count: int = BATCH) -> NDArray:
        del count
        self._asked = self._algorithm.ask()
        return self._asked.get("X")

    def tell(self, asked: NDArray, rewards: NDArray) -> None:
        del asked
        self._asked.set("F", -rewards[:, None])
        self._algorithm.tell(infills=self._asked)


def _genetic(box: Box, seed: int) -> Method:
    try:
        from pymoo.algorithms.soo.nonconvex.ga import GA
    except ImportError:
        raise ZooError("genetic needs pymoo: pip install 'prunezoo[search]'.") from None
    return _Pymoo(partial(GA, n_offsprings=BATCH), 2 * BATCH, box, seed)


def _swarm(box: Box, seed: int) -> Method:
    try:
        from pymoo.algorithms.soo.nonconvex.pso import PSO
    except ImportError:
        raise ZooError("swarm needs pymoo: pip install 'prunezoo[search]'.") from None
    return _Pymoo(PSO, BATCH, box, seed)


class _Annealing:
    """Metropolis's rule at a temperature that falls with 1 / batches (Szu and Hartley, 1987).

    A batch is proposed around one state, and its candidates are accepted or not one by one. No
    library: scipy's `dual_annealing` calls the function itself, on one candidate at a time.
    """

    def __init__(self, box: Box, seed: int) -> None:
        self._box, self._rng = box, np.random.default_rng(seed)
        self._state, self._reward = self._rng.uniform(*RANDOM, box.groups), -np.inf
        self._batch = 0

    def ask(self, count: int = BATCH) -> NDArray:
        self._batch += 1
        if self._box.warm and self._batch == 1:
            return self._box.near_start(count, self._rng)
        step = 0.25 / self._batch**0.3
        moves = self._rng.normal(0, step, (count, len(self._state)))
        return np.clip(self._state + moves, self._box.low, self._box.high)

    def tell(self, asked: NDArray, rewards: NDArray) -> None:
        temperature = 0.05 / self._batch
        for candidate, reward in zip(asked, rewards, strict=True):
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
    screen: int = 1
    """proposals for each candidate that is played; a surrogate chooses"""
    seed: int = 0
    """of the surrogate"""
    measured: list[tuple[list[float], float]] = field(default_factory=list)
    """keep ratios and mean reward of every candidate"""
    best: list[Episode] = field(default_factory=list)
    """episodes of the candidate with the best mean reward, one per entry"""

    def play(self, env: PruningVectorEnv) -> list[Episode]:
        """Play the next batch, tell the method its rewards, and return the episodes."""
        asked = self._ask(env)
        batch, per = asked[: self.left], len(self.entries)
        ratios = self._keep_ratios(env, batch)
        played = play(env, np.repeat(ratios, per, axis=0), self.entries * len(batch))
        candidates = [played[at : at + per] for at in range(0, len(played), per)]
        self.best = max([self.best, *candidates] if self.best else candidates, key=_mean)
        self.left -= len(batch)
        for episodes in candidates if self.screen > 1 else ():
            kept = np.divide(episodes[0]["widths"], env.groups.sizes).tolist()
            self.measured.append((kept, _mean(episodes)))
        if len(batch) == len(asked):
            self.method.tell(asked, np.array([_mean(episodes) for episodes in candidates]))
        return played

    def _ask(self, env: PruningVectorEnv) -> NDArray:
        """The next batch; of `screen` times as many proposals those that the surrogate likes."""
        if self.screen == 1 or len(self.measured) < ENOUGH:
            return self.method.ask()
        asked = self.method.ask(self.screen * BATCH)
        rolled = roll_out(env, self._keep_ratios(env, asked), [self.entries[0]] * len(asked))
        proposed = np.divide([rollout.widths for rollout in rolled], env.groups.sizes)
        known, rewards = map(np.array, zip(*self.measured, strict=True))
        return asked[best_of(proposed, known, rewards, BATCH, self.seed)]

    def _keep_ratios(self, env: PruningVectorEnv, asked: NDArray) -> NDArray:
        """What was asked for as keep ratios, shape (batch, groups); from actions with a start."""
        start = env.queue[self.entries[0]].start
        if start is None:
            return asked
        return np.array([list(map(keep_ratio, row, start)) for row in asked.tolist()])


def _mean(episodes: Sequence[Episode]) -> float:
    return fmean(episode["reward"] for episode in episodes)


def _train(
    make_method: Callable[[Box, int], Method],
    env: PruningVectorEnv,
    episodes: int,
    *,
    seed: int,
    on_episode: Callable[[Episode], None],
    stop: Callable[[], bool] = lambda: False,
    screen: int = 1,
) -> list[Episode]:
    """Search for `episodes` episodes, rounded down to whole candidates, at least one.

    Args:
        make_method: makes a method from what it searches and a seed.
        env: environments in lockstep; only their queue, projection and reward are used. Every
            factor of the queue has a search of its own.
        episodes: how many to play; a candidate takes one per task.
        seed: of the method.
        on_episode: called with every finished episode, in order.
        stop: called after every batch; true ends the search, as Ctrl-C does.
        screen: proposals for each candidate that is played. A surrogate that was fitted to the
            candidates so far chooses among them; `pymoo`'s methods propose no more than they play.

    Returns:
        The episodes of the best candidate, one per entry of the queue; fewer if the search is
        interrupted before every factor had a batch.
    """
    if make_method is _Random:
        check_cold("random", env)
    candidates = max(1, episodes // len(env.queue))
    searches = []
    for cf in dict.fromkeys(entry.cf for entry in env.queue):
        entries = [number for number, entry in enumerate(env.queue) if entry.cf == cf]
        method = make_method(Box.of(env), seed)
        searches.append(_Search(method, entries, candidates, screen, seed))
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
