"""Surrogates: what the evaluations so far say of profiles that were not measured."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError

__all__ = ["ENOUGH", "GaussianProcess", "best_of"]

ENOUGH = 32
"""Measured profiles from which the surrogate is asked."""

SAMPLE = 300
"""Profiles that a Gaussian process fits its length scales to; fitting takes cubic time."""


class GaussianProcess:
    """A smooth function of keep ratios, through noisy accuracies.

    A Gaussian process with a Matérn kernel (ν = 5/2), one length scale per channel group, and
    noise. Far from all measured profiles it gives their mean.

    Args:
        measured: keep ratios, shape (N, groups).
        accuracies: of these, shape (N,).
        seed: of the sample of profiles that the length scales are fitted to.

    Raises:
        ZooError: if scikit-learn is not installed.
    """

    def __init__(self, measured: NDArray, accuracies: NDArray, seed: int = 0) -> None:
        module = _sklearn("gaussian_process")
        kernels = _sklearn("gaussian_process.kernels")
        kernel = (
            kernels.ConstantKernel()
            * kernels.Matern(np.ones(measured.shape[1]), (0.05, 1e3), nu=2.5)
            + kernels.WhiteKernel()
        )
        some = np.random.default_rng(seed).permutation(len(measured))[:SAMPLE]
        fitted = module.GaussianProcessRegressor(kernel, normalize_y=True)
        with warnings.catch_warnings():  # a group without influence has no finite length scale
            warnings.simplefilter("ignore", _sklearn("exceptions").ConvergenceWarning)
            fitted.fit(measured[some], accuracies[some])
        self._process = module.GaussianProcessRegressor(
            fitted.kernel_, optimizer=None, normalize_y=True
        ).fit(measured, accuracies)

    def __call__(self, keep_ratios: NDArray) -> NDArray:
        """The expected accuracies, shape (M,), of keep ratios of shape (M, groups)."""
        found: NDArray = self._process.predict(keep_ratios)
        return found


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
    forest = _sklearn("ensemble").RandomForestRegressor(
        n_estimators=100, random_state=seed, n_jobs=1
    )
    forest.fit(measured, rewards)
    return np.argsort(-forest.predict(proposed), kind="stable")[:count]


def _sklearn(module: str) -> Any:
    try:
        return import_module(f"sklearn.{module}")
    except ImportError:
        raise ZooError("Surrogates need scikit-learn: pip install 'prunezoo[search]'.") from None
