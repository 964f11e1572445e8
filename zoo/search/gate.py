"""The gate: how well each cheap fidelity ranks profiles, against a long fine-tune of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.errors import ZooError

__all__ = ["ENOUGH", "Agreement", "agreement"]

ENOUGH = 0.7
"""The least correlation within the top half of a fidelity that searches may use."""


@dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlations of a fidelity with the long fine-tune.

    Attributes:
        overall: over all profiles.
        top_half: over the half of the profiles that the long fine-tune puts first.
        count: of profiles.
    """

    overall: float
    top_half: float
    count: int


def agreement(accuracies: Sequence[float], long: Sequence[float]) -> Agreement:
    """The agreement of `accuracies` with those of the `long` fine-tune, profile by profile.

    Raises:
        ZooError: for fewer than four profiles, or lists of different lengths.
    """
    if len(accuracies) != len(long) or len(long) < 4:
        raise ZooError(
            f"Ranks need the same four profiles or more on both sides, got {len(accuracies)} and "
            f"{len(long)} accuracies."
        )
    cheap, truth = np.asarray(accuracies), np.asarray(long)
    top = np.argsort(-truth, kind="stable")[: (len(truth) + 1) // 2]
    return Agreement(_spearman(cheap, truth), _spearman(cheap[top], truth[top]), len(truth))


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(left, right).statistic)
