"""A surrogate: what the evaluations so far say of profiles that were not measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError

__all__ = ["ENOUGH", "best_of"]

ENOUGH = 32
"""Measured profiles from which the surrogate is asked."""


def best_of(
    proposed: NDArray, measured: NDArray, rewards: NDArray, count: int, seed: int
) -> NDArray[np.intp]:
    """The indices of the `count` proposed profiles that a random forest ranks best.

    Args:
        proposed: keep ratios of the profiles to choose from, shape (N, groups).
        measured: keep ratios of the profiles measured so far, shape (M, groups).
        rewards: of these, shape (M,).
        count: how many to choose.
        seed: of the forest.

    Raises:
        ZooError: if scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import RandomForestRegressor
    except ImportError:
        raise ZooError("Screening needs scikit-learn: pip install 'prunezoo[search]'.") from None
    forest = RandomForestRegressor(n_estimators=100, random_state=seed, n_jobs=1)
    forest.fit(measured, rewards)
    return np.argsort(-forest.predict(proposed), kind="stable")[:count]
