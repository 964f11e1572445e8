"""A made-up accuracy over a real network's channel groups, whose best profile is known.

The share of the base accuracy that widths keep is exp(-loss), with the loss

    Σ a_i (1/β_i - 1) + Σ b_ij (1/√(β_i β_j) - 1)

over groups i and over neighbours i, j that share a layer; β are the keep ratios of the widths. The
a differ by orders of magnitude. In x = log β the loss is a sum of exponentials, and so is the cost
of a network. Finding the least loss at a given factor is therefore a convex problem (a geometric
programme), and descent from any start finds its only optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import NonlinearConstraint, minimize

from zoo.planning.solver import FLOOR
from zoo.search.env import PruningEnv
from zoo.search.ledger_benchmark import imagined_task
from zoo.search.tasks import Candidate, Task
from zoo.search.vector_env import PruningVectorEnv
from zoo.spec.cost import CostModel, cost_model
from zoo.spec.groups import ChannelGroups
from zoo.tracing.known_groups import reference_groups

__all__ = ["Synthetic"]


@dataclass(frozen=True)
class Synthetic:
    """The problem for one draw of the layers' importances, at one factor in parameters."""

    seed: int = 0
    arch: str = "resnet20-16"
    cf: float = 4.0
    loss: float = 0.7
    """of the equal policy, with continuous keep ratios"""
    spread: float = 1.2
    """standard deviation of the log importances"""
    base_accuracies: tuple[float, ...] = (0.9, 0.6)
    """of the tasks of the queue; the share that a profile keeps is the same on all"""

    def env(self, num_envs: int = 8) -> PruningVectorEnv:
        """Environments to search the problem in."""
        return PruningVectorEnv(
            lambda: PruningEnv(self.tasks, self.groups, self.cf, self.evaluate), num_envs
        )

    def evaluate(self, candidates: Sequence[Candidate]) -> list[float]:
        """The accuracies, in place of the search's evaluator."""
        return [c.task.base_accuracy * self.share(c.widths) for c in candidates]

    def share(self, widths: Sequence[int]) -> float:
        """The share of the base accuracy that a network of these widths keeps."""
        return math.exp(-self._loss(np.log(np.array(widths) / self.groups.sizes)))

    @cached_property
    def optimum(self) -> float:
        """The largest share of any keep ratios from `FLOOR` to 1 at the factor."""
        return math.exp(-self._loss(np.log(self.best)))

    @cached_property
    def best(self) -> NDArray:
        """The keep ratios of the optimum."""
        return self.descend(np.full(len(self.groups.sizes), math.exp(self._log_equal)))

    def descend(self, keep_ratios: NDArray) -> NDArray:
        """The best keep ratios, by descent from `keep_ratios`."""
        found = minimize(
            self._loss,
            np.log(keep_ratios),
            method="SLSQP",
            bounds=[(math.log(FLOOR), 0.0)] * len(keep_ratios),
            constraints=NonlinearConstraint(self._room, 0, np.inf),
            options={"maxiter": 1000, "ftol": 1e-12},
        )
        if not found.success:
            raise RuntimeError(found.message)
        return np.exp(found.x)

    @cached_property
    def equal(self) -> float:
        """The share at one common keep ratio."""
        return math.exp(-self._loss(np.full(len(self.groups.sizes), self._log_equal)))

    @cached_property
    def groups(self) -> ChannelGroups:
        return reference_groups(self.arch)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(
            imagined_task(f"base-{index}", self.groups, accuracy)
            for index, accuracy in enumerate(self.base_accuracies)
        )

    @cached_property
    def _model(self) -> CostModel:
        return cost_model(self.groups)

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        near = self._model.neighbours
        return [(i, j) for i in range(len(near)) for j in near[i] if i < j]

    @cached_property
    def _weights(self) -> tuple[NDArray, NDArray]:
        """a and b, such that the equal policy has the stated loss."""
        rng = np.random.default_rng(self.seed)
        single = rng.lognormal(0, self.spread, len(self.groups.sizes))
        pairs = rng.lognormal(0, self.spread, len(self._pairs)) / 4
        scale = self.loss / (single.sum() + pairs.sum()) / (math.exp(-self._log_equal) - 1)
        return scale * single, scale * pairs

    @cached_property
    def _log_equal(self) -> float:
        low, high = math.log(FLOOR), 0.0
        for _ in range(60):
            middle = (low + high) / 2
            above = self._room(np.full(len(self.groups.sizes), middle)) < 0
            low, high = (low, middle) if above else (middle, high)
        return low

    def _loss(self, x: NDArray) -> float:
        single, pairs = self._weights
        means = [(x[i] + x[j]) / 2 for i, j in self._pairs]
        return float(single @ np.expm1(-x) + pairs @ np.expm1(-np.array(means)))

    def _room(self, x: NDArray) -> float:
        """log(allowed cost / cost) of the keep ratios exp(x); negative if they cost too much."""
        widths = np.exp(x) * self.groups.sizes
        dense = self._model.total(self.groups.sizes, "params")
        return math.log(dense / self.cf / self._model.total(widths, "params"))
