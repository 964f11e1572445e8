"""The gate: how well a cheap fidelity ranks profiles, compared with a long fine-tune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.common.correlation import rank_correlation
from zoo.errors import ZooError

__all__ = ["ENOUGH", "RANKED", "Agreement", "agreement"]

ENOUGH = 0.7
"""The smallest `Agreement.top_half` of a fidelity that searches may use."""


RANKED = ("params",)
"""Metrics whose best profiles recalibration ranks well enough (docs/evidence.md)."""


@dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlations of a fidelity with the long fine-tune.

    Attributes:
        overall: over all profiles.
        top_half: over the half of the profiles that the long fine-tune puts first.
        interval: 95 % bootstrap interval of `top_half` over those profiles; NaN if all of them are
            equal.
        count: number of profiles.
    """

    overall: float
    top_half: float
    interval: tuple[float, float]
    count: int


def agreement(accuracies: Sequence[float], long: Sequence[float]) -> Agreement:
    """The agreement of `accuracies` with those of the `long` fine-tune, profile by profile.

    Raises:
        ZooError: for fewer than four profiles, or lists of different lengths.
    """
    if len(accuracies) != len(long) or len(long) < 4:
        raise ZooError(
            f"Ranks need four profiles or more, the same on both sides, got {len(accuracies)} and "
            f"{len(long)} accuracies."
        )
    cheap, truth = np.asarray(accuracies), np.asarray(long)
    top = np.argsort(-truth, kind="stable")[: (len(truth) + 1) // 2]
    interval = _interval(cheap[top], truth[top])
    within = rank_correlation(cheap[top], truth[top])
    return Agreement(rank_correlation(cheap, truth), within, interval, len(truth))


def _interval(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the correlation over 2,000 resamples (seed 0)."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(left), size=(2000, len(left)))
    resampled = (rank_correlation(left[i], right[i]) for i in drawn)
    # a resample of equal values has no correlation
    found = [correlation for correlation in resampled if not math.isnan(correlation)]
    if not found:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
