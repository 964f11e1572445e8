"""Rewards at the end of an episode. No torch."""

from __future__ import annotations

import math

from zoo.errors import ZooError

__all__ = ["gaussian"]


def gaussian(
    accuracy: float,
    base_accuracy: float,
    factor: float,
    target: float,
    sigma: float | None = None,
) -> float:
    """(A / A_e) · exp(-(C - C_e)² / 2σ²): accuracy kept, at the factor that was asked for.

    The paper's equation 10, with C and C_e read as compression factors and σ as 0.1 · C_e; its own
    σ = 0.3 (figure 9) belongs to a compression on a 0-1 scale.

    Args:
        accuracy, base_accuracy: A and A_e, of the pruned and of the dense network, in [0, 1].
        factor, target: C and C_e, at least 1.
        sigma: σ; 0.1 · `target` by default.

    Raises:
        ZooError: if the accuracy is not a number in [0, 1], or a divisor is not positive.
    """
    width = 0.1 * target if sigma is None else sigma
    if not 0 <= accuracy <= 1:
        raise ZooError(f"An accuracy of {accuracy} cannot be rewarded; it must be in [0, 1].")
    if not base_accuracy > 0 or not width > 0:
        raise ZooError(f"base_accuracy ({base_accuracy}) and sigma ({width}) must be positive.")
    return accuracy / base_accuracy * math.exp(-((factor - target) ** 2) / (2 * width**2))
