"""Rewards at the end of an episode. No torch.

Every reward is a function of one `Outcome`; its values are numbers, or arrays that broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError, unknown

__all__ = ["REWARDS", "Outcome", "gaussian", "hyperbolic", "landscape", "n2n"]

Array = NDArray[np.float64]
Values = float | Array

EXPECTED_SHARE = 0.9
"""A_e of the hyperbolic reward, as a share of the base accuracy (paper, figure 11)."""

TEMPERATURE = 0.3
"""τ of the hyperbolic reward; the paper gives none."""


@dataclass(frozen=True)
class Outcome:
    """The result of an episode.

    Attributes:
        accuracy, base_accuracy: of the pruned and of the dense network, in [0, 1].
        factor, target: the compression factor that was met and the one asked for, at least 1.
        keep_ratios: kept / dense channels, one per step.
        equal: the keep ratio that meets `target` if all steps have it.
        sigma: σ of the gaussian reward, in units of the factor; 0.1 · `target` by default.

    Raises:
        ZooError: if an accuracy is not a number in [0, 1], or a divisor is not positive.
    """

    accuracy: Values
    base_accuracy: float
    factor: Values
    target: float
    keep_ratios: Sequence[Values]
    equal: float
    sigma: float | None = None

    def __post_init__(self) -> None:
        fits = (np.asarray(self.accuracy) >= 0) & (np.asarray(self.accuracy) <= 1)
        if not np.all(fits):
            raise ZooError(
                f"An accuracy of {self.accuracy} cannot be rewarded; it must be in [0, 1]."
            )
        if not self.base_accuracy > 0 or not self.width > 0:
            raise ZooError(
                f"base_accuracy ({self.base_accuracy}) and sigma ({self.width}) must be positive."
            )

    @property
    def share(self) -> Values:
        """A / A_e: accuracy kept; above 1 where the pruned network is the better one."""
        return self.accuracy / self.base_accuracy

    @property
    def width(self) -> float:
        """σ of the gaussian reward."""
        return 0.1 * self.target if self.sigma is None else self.sigma


def gaussian(outcome: Outcome) -> Values:
    """(A / A_e) · exp(-(C - C_e)² / 2σ²): accuracy kept, at the factor that was asked for.

    The paper's equation 10, with C and C_e read as compression factors and σ as 0.1 · C_e; its own
    σ = 0.3 (figure 9) belongs to a compression on a 0-1 scale.
    """
    missed = (outcome.factor - outcome.target) / outcome.width
    return outcome.share * np.exp(-(missed**2) / 2)


def n2n(outcome: Outcome) -> Values:
    """(A / A_e) · (1 - C)², with C the kept fraction of the cost (paper, equation 14).

    The more is removed the better, whatever was asked for.
    """
    return outcome.share * (1 - 1 / outcome.factor) ** 2


def hyperbolic(outcome: Outcome) -> Values:
    """r_a · Σ_i r_c^i: accuracy kept times what every step removed (paper, equations 15 to 17).

    C in equation 15 is read as the removed fraction of a step's channels, and C_e as the fraction
    that the equal policy removes to meet the factor, since the paper ties C_e to no factor.
    Equation 16 is divided by τ like 15, with the final A / A_e in place of Σa_t / A, and 17 sums
    over the steps.
    """
    removed = (_above(1 - kept, 1 - outcome.equal) for kept in outcome.keep_ratios)
    return _above(outcome.share, EXPECTED_SHARE) * sum(removed)


def _above(fraction: Values, expected: float) -> Values:
    """A sigmoid through 0 at 0 and 1 at 1, steepest at `expected`."""
    bottom = np.tanh(expected / TEMPERATURE)
    top = np.tanh((1 - expected) / TEMPERATURE)
    return (np.tanh((fraction - expected) / TEMPERATURE) + bottom) / (top + bottom)


REWARDS: dict[str, Callable[[Outcome], Values]] = {
    "gaussian": gaussian,
    "n2n": n2n,
    "hyperbolic": hyperbolic,
}


def landscape(
    reward: str, target: float, sigma: float | None = None, points: int = 101
) -> tuple[Array, Array, Array]:
    """A reward over accuracy and compression, for a network of one group (paper, figures 9 to 11).

    Args:
        reward: one of `REWARDS`.
        target: the compression factor asked for.
        sigma: as in `Outcome`.
        points: per axis.

    Returns:
        The shares of the base accuracy, from 0 to 1; the removed fractions of the cost, from 0 to
        almost 1 (the factor is 1 / (1 - removed)); the rewards, one row per removed fraction.

    Raises:
        ZooError: for an unknown reward.
    """
    if reward not in REWARDS:
        raise unknown("reward", reward, REWARDS)
    shares = np.linspace(0, 1, points)
    removed = np.linspace(0, 1, points, endpoint=False)
    kept = 1 - removed[:, None]
    outcome = Outcome(shares, 1.0, 1 / kept, target, (kept,), 1 / target, sigma)
    return shares, removed, np.asarray(REWARDS[reward](outcome))
