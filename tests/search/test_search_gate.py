from __future__ import annotations

import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.search.gate import agreement


def test_ranks_count_and_values_do_not():
    long = np.random.default_rng(0).uniform(size=20)
    found = agreement(np.exp(9 * long), long)
    assert (found.overall, found.top_half, found.count) == (pytest.approx(1), pytest.approx(1), 20)
    assert found.interval == (pytest.approx(1), pytest.approx(1))
    assert agreement(-long, long).overall == pytest.approx(-1)


def test_the_top_half_is_the_long_fine_tunes():
    """A fidelity may tell good from bad, and know nothing among the good."""
    long = np.arange(20.0)
    cheap = np.array([*range(10), *range(19, 9, -1)])
    found = agreement(cheap, long)
    assert found.top_half == pytest.approx(-1)
    assert found.overall > 0.6


def test_the_interval_holds_the_estimate_and_shrinks_with_more_profiles():
    rng = np.random.default_rng(1)
    widths = []
    for count in (30, 300):
        long = rng.uniform(size=count)
        found = agreement(long + rng.normal(0, 0.1, count), long)
        low, high = found.interval
        assert low < found.top_half < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_fidelity_that_calls_the_best_alike_has_no_interval():
    long = np.arange(8.0)
    found = agreement(np.array([0, 1, 2, 3, 5, 5, 5, 5.0]), long)
    assert np.isnan(found.top_half)
    assert np.isnan(found.interval).all()
    assert found.overall > 0.9


def test_what_cannot_be_ranked_is_refused():
    for cheap, long in (([0.1] * 3, [0.1] * 3), ([0.1] * 5, [0.1] * 6)):
        with pytest.raises(ZooError, match="four profiles or more"):
            agreement(cheap, long)
