"""The registry's evaluations of a network as a search problem that needs no training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from zoo.common.correlation import rank_correlation
from zoo.data.datasets import ImageSet
from zoo.errors import FactorError
from zoo.search.env import EnvSettings, PruningEnv
from zoo.search.lookup import EvaluatedProfile, evaluated_profiles
from zoo.search.surrogate import GaussianProcess
from zoo.search.tasks import Candidate, Task
from zoo.search.vector_env import PruningVectorEnv
from zoo.spec.cost import cost_model
from zoo.spec.groups import ChannelGroups
from zoo.tracing.known_groups import reference_groups

__all__ = ["LedgerBenchmark", "imagined_task"]

MOST = 2000
"""Profiles that a process is fitted to; fitting takes cubic time."""

FOLDS = 5
"""Into which the profiles are split to see how well a benchmark predicts those that it lacks."""


class LedgerBenchmark:
    """A search problem that needs no training: accuracies that a ledger's evaluations predict.

    A Gaussian process, fitted to the profiles of one measurement, stands in for the network. It
    takes seconds to fit and a millisecond to ask. `held_out` says how well it predicts: near the
    factors that were measured alone. Where a search's factor is among several, say `near`.
    Accuracies on test images are left out.

    Args:
        architecture: a name of the registry.
        network, fidelity, ledger: as for `ledger_lookup`; of the measurements that are left, the
            one of most profiles is taken, or of those a random sample of 2,000.
        near: a metric and a factor, such as `("macs", 4.0)`: profiles within a tenth of it alone.

    Raises:
        FactorError: if no profile is left.
        ZooError: as `ledger_lookup`; if scikit-learn or gymnasium is not installed.

    Attributes:
        groups: the channel groups of the architecture.
        measurement: what is predicted.
        profiles: what it is predicted from.
    """

    def __init__(
        self,
        architecture: str,
        *,
        network: str = "",
        fidelity: str = "",
        ledger: str | Path | None = None,
        near: tuple[Literal["params", "macs"], float] | None = None,
    ) -> None:
        self.groups: ChannelGroups = reference_groups(architecture)
        found = [
            profile
            for profile in evaluated_profiles(
                architecture, network=network, fidelity=fidelity, ledger=ledger
            )
            if not profile.measurement.on_test
        ]
        if near is not None:
            found = self._near(found, *near)
        if not found:
            where = f" near {near[1]:g}x {near[0]}" if near else ""
            raise FactorError(
                f"No profile of {architecture}{where} was measured on validation images."
            )
        own = defaultdict(list)
        for each in found:
            own[each.measurement].append(each)
        self.measurement, found = max(own.items(), key=lambda item: len(item[1]))
        sample = np.random.default_rng(0).permutation(len(found))[:MOST]
        self.profiles = [found[index] for index in sorted(sample)]
        self._ratios = np.array([tuple(each.keep_ratios.values()) for each in self.profiles])
        self._accuracies = np.array([each.accuracy for each in self.profiles])
        self._process = GaussianProcess(self._ratios, self._accuracies)
        self.task = imagined_task(architecture, self.groups, float(self._accuracies.max()))

    def _near(
        self, profiles: Sequence[EvaluatedProfile], metric: Literal["params", "macs"], cf: float
    ) -> list[EvaluatedProfile]:
        """The profiles within a tenth of a factor."""
        factor = cost_model(self.groups).factor
        return [p for p in profiles if abs(factor(tuple(p.kept.values()), metric) / cf - 1) < 0.1]

    def accuracies(self, keep_ratios: NDArray) -> NDArray:
        """The predicted accuracies, shape (N,), of keep ratios of shape (N, groups)."""
        return self._process(np.asarray(keep_ratios, dtype=float))

    def evaluate(self, candidates: Sequence[Candidate]) -> list[float]:
        """The predicted accuracies in [0, 1] of candidates, in place of a search's evaluator."""
        ratios = [np.array(each.widths) / self.groups.sizes for each in candidates]
        return [float(value) for value in self.accuracies(np.array(ratios)).clip(0, 1)]

    def env(
        self,
        cf: float,
        metric: Literal["params", "macs"] = "params",
        num_envs: int = 8,
    ) -> PruningVectorEnv:
        """The search as environments for reinforcement learning, or for any of the zoo's agents.

        The features of channels, which are Taylor scores in a search, are random numbers here.

        Args:
            cf: the factor to reach.
            metric: of the factor.
            num_envs: episodes that are played at a time.
        """
        settings = EnvSettings(metric=metric)
        return PruningVectorEnv(
            lambda: PruningEnv((self.task,), self.groups, cf, self.evaluate, settings), num_envs
        )

    def held_out(self, seed: int = 0) -> tuple[float, float]:
        """Rank correlations of accuracies with predictions by a process that lacks the profile.

        Returns:
            Spearman's ρ over all profiles, and over the better half alone.
        """
        order = np.random.default_rng(seed).permutation(len(self.profiles))
        predicted = np.empty(len(order))
        for fold in range(FOLDS):
            left = order[fold::FOLDS]
            rest = np.setdiff1d(order, left)
            process = GaussianProcess(self._ratios[rest], self._accuracies[rest])
            predicted[left] = process(self._ratios[left])
        better = self._accuracies > np.median(self._accuracies)
        return (
            rank_correlation(predicted, self._accuracies),
            rank_correlation(predicted[better], self._accuracies[better]),
        )


def imagined_task(name: str, groups: ChannelGroups, base_accuracy: float) -> Task:
    """A task without a network and images, for accuracies that are computed otherwise."""
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    nothing = ImageSet("nothing", images, torch.zeros(1).long(), ("a", "b"), (0.5,) * 3, (0.5,) * 3)
    rng = np.random.default_rng(0)
    features = tuple(rng.exponential(size=size) for size in groups.sizes)
    return Task(
        name, name, torch.nn.Identity(), groups, nothing, nothing, base_accuracy, name, features
    )
