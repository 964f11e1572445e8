from __future__ import annotations

import math

import pytest

from zoo.errors import ZooError
from zoo.search.reward import gaussian


def test_at_the_target_the_reward_is_the_share_of_accuracy():
    assert gaussian(0.6, 0.8, 4.0, 4.0) == pytest.approx(0.75)


def test_missing_by_one_sigma_costs_the_same_on_both_sides():
    low, high = gaussian(0.8, 0.8, 3.6, 4.0), gaussian(0.8, 0.8, 4.4, 4.0)
    assert low == pytest.approx(high) == pytest.approx(math.exp(-0.5))


def test_default_sigma_grows_with_the_target():
    assert gaussian(0.5, 0.5, 2.2, 2.0) == pytest.approx(gaussian(0.5, 0.5, 6.6, 6.0))
    assert gaussian(0.5, 0.5, 2.2, 2.0, sigma=0.1) == pytest.approx(math.exp(-2))


@pytest.mark.parametrize("accuracy", [float("nan"), -0.1, 76.0])
def test_what_is_no_accuracy_is_refused(accuracy):
    with pytest.raises(ZooError, match="accuracy"):
        gaussian(accuracy, 0.8, 4.0, 4.0)
