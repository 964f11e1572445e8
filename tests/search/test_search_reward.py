from __future__ import annotations

import math

import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.search.reward import REWARDS, Outcome, gaussian, hyperbolic, landscape, n2n


def outcome(accuracy=0.6, base_accuracy=0.8, factor=4.0, target=4.0, kept=(0.5, 0.5), **options):
    return Outcome(accuracy, base_accuracy, factor, target, kept, equal=0.5, **options)


def test_at_the_target_the_gaussian_reward_is_the_share_of_accuracy():
    assert gaussian(outcome()) == pytest.approx(0.75)


def test_missing_by_one_sigma_costs_the_same_on_both_sides():
    low, high = (gaussian(outcome(accuracy=0.8, factor=factor)) for factor in (3.6, 4.4))
    assert low == pytest.approx(high) == pytest.approx(math.exp(-0.5))


def test_default_sigma_grows_with_the_target():
    small, large = outcome(factor=2.2, target=2.0), outcome(factor=6.6, target=6.0)
    assert gaussian(small) == pytest.approx(gaussian(large))
    narrow = outcome(accuracy=0.8, factor=2.2, target=2.0, sigma=0.1)
    assert gaussian(narrow) == pytest.approx(math.exp(-2))


def test_n2n_is_blind_to_the_target_and_nothing_for_a_dense_network():
    assert n2n(outcome(target=2.0)) == n2n(outcome(target=6.0)) == pytest.approx(0.75 * 0.75**2)
    assert n2n(outcome(factor=1.0)) == 0


def test_hyperbolic_is_nothing_for_a_dense_network_and_counts_the_steps_at_the_extreme():
    assert hyperbolic(outcome(kept=(1.0, 1.0, 1.0))) == pytest.approx(0)
    assert hyperbolic(outcome(accuracy=0.0)) == pytest.approx(0)
    ideal = outcome(accuracy=0.8, kept=(0.0, 0.0, 0.0))
    assert hyperbolic(ideal) == pytest.approx(3)


def test_hyperbolic_falls_most_steeply_below_what_is_expected():
    """As the paper says of it: accuracy and compression are discouraged below the expectation."""

    def steepest(values):
        return int(np.argmax(np.diff(values)))

    shares, removed, rewards = landscape("hyperbolic", target=5.0)  # C_e = 0.8: figure 11
    assert shares[steepest(rewards[-1])] == pytest.approx(0.9, abs=0.02)
    assert removed[steepest(rewards[:, -1])] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("name", REWARDS)
def test_a_landscape_is_the_reward_of_its_points(name):
    shares, removed, rewards = landscape(name, target=2.0, sigma=0.4, points=11)
    assert rewards.shape == (11, 11)
    for row, column in ((0, 3), (5, 10), (8, 0), (10, 10)):
        kept = 1 - removed[row]
        point = Outcome(shares[column], 1.0, 1 / kept, 2.0, (kept,), 0.5, 0.4)
        assert REWARDS[name](point) == pytest.approx(rewards[row, column])


def test_only_the_gaussian_landscape_peaks_at_the_asked_compression():
    """Figure 9 against figures 10 and 11."""
    peaks = {}
    for name in REWARDS:
        _, removed, rewards = landscape(name, target=2.0)
        peaks[name] = removed[rewards[:, -1].argmax()]
    assert peaks["gaussian"] == pytest.approx(0.5, abs=0.01)
    assert peaks["n2n"] == peaks["hyperbolic"] == removed[-1]


@pytest.mark.parametrize("name", REWARDS)
def test_more_accuracy_never_pays_less(name):
    assert (np.diff(landscape(name, target=4.0)[2], axis=1) >= 0).all()


@pytest.mark.parametrize("accuracy", [float("nan"), float("inf"), -0.1, 76.0])
def test_what_is_no_accuracy_is_refused(accuracy):
    with pytest.raises(ZooError, match=f"accuracy of {accuracy}.*in \\[0, 1\\]"):
        outcome(accuracy=accuracy)
    with pytest.raises(ZooError, match="accuracy"):
        outcome(accuracy=np.array([0.5, accuracy]))


def test_what_cannot_divide_is_refused():
    with pytest.raises(ZooError, match="base_accuracy"):
        outcome(base_accuracy=0.0)
    with pytest.raises(ZooError, match="sigma"):
        outcome(sigma=0.0)
    with pytest.raises(ZooError, match="Did you mean 'gaussian'"):
        landscape("gausian", target=4.0)
