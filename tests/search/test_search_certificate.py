"""Certificates of candidates whose rank and whose effect are known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from zoo.common.documents import decode, encode
from zoo.errors import ZooError
from zoo.search.certificate import certify, compare, everywhere, holm, rank
from zoo.spec.certificate import Certificate
from zoo.spec.profile import Evidence

PAIRS = [(network, 0) for network in "abcdef"]


def paired(accuracies):
    return dict(zip(PAIRS, accuracies, strict=False))


BEST = paired([0.71, 0.73, 0.70, 0.62, 0.64, 0.60])
WORSE = paired([0.66, 0.69, 0.65, 0.58, 0.59, 0.56])
TIED = paired([0.72, 0.72, 0.70, 0.61, 0.65, 0.60])


# --- rank -----------------------------------------------------------------------------------------


def test_the_rank_counts_ties_against_the_candidate():
    found = rank(0.6, [0.5, 0.6, 0.7, 0.4])
    assert (found.profiles, found.at_least_as_good, found.probability) == (4, 2, 0.5)


@pytest.mark.parametrize(("profiles", "better"), [(1, 0), (1, 1), (200, 0), (200, 3), (50, 50)])
def test_the_interval_is_the_exact_binomial_one(profiles, better):
    found = rank(0.5, [0.9] * better + [0.1] * (profiles - better))
    expected = stats.binomtest(better, profiles).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("profiles", [5, 40])
def test_the_interval_covers_every_probability_95_times_in_100(profiles):
    found = [
        rank(0.5, [0.9] * better + [0.1] * (profiles - better)) for better in range(profiles + 1)
    ]
    for truth in np.linspace(0, 1, 101):
        covered = sum(
            math.comb(profiles, k) * truth**k * (1 - truth) ** (profiles - k)
            for k, row in enumerate(found)
            if row.low <= truth <= row.high
        )
        assert covered >= 0.95 - 1e-9


def test_a_candidate_of_known_rank_is_found_there():
    """Random profiles are uniform, so that one is as good as 0.9 with probability 0.1."""
    generator = random.Random(0)
    found = [rank(0.9, [generator.random() for _ in range(200)]) for _ in range(400)]
    assert np.mean([row.probability for row in found]) == pytest.approx(0.1, abs=0.005)
    assert np.mean([row.low <= 0.1 <= row.high for row in found]) >= 0.95 - 2 * 0.011


@given(st.lists(st.floats(0, 1), min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_a_better_accuracy_never_ranks_worse(others, one, other):
    low, high = (rank(accuracy, others) for accuracy in sorted((one, other)))
    assert 0 <= high.low <= high.probability <= high.high <= 1
    assert high.probability <= low.probability
    assert (high.low, high.high) <= (low.low, low.high)


# --- tests against rivals -------------------------------------------------------------------------


def test_p_is_that_of_a_paired_t_test():
    (found,) = compare(BEST, {"worse": WORSE})
    expected = stats.ttest_rel(list(BEST.values()), list(WORSE.values()), alternative="greater")
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.networks == 6
    assert found.difference == pytest.approx(np.mean([0.05, 0.04, 0.05, 0.04, 0.05, 0.04]))
    assert found.sd == pytest.approx(np.std([0.05, 0.04] * 3, ddof=1))


def test_p_is_the_tabulated_one_at_a_critical_value():
    """Student's t of 4 degrees of freedom exceeds 2.132 with probability 0.05."""
    noise = np.array([-0.02, -0.01, 0, 0.01, 0.02])
    mean = 2.132 * noise.std(ddof=1) / math.sqrt(5)
    rival = paired([0.5] * 5)
    (found,) = compare(paired(0.5 + mean + noise), {"rival": rival})
    assert found.p == pytest.approx(0.05, abs=1e-4)
    (turned,) = compare(rival, {"candidate": paired(0.5 + mean + noise)})
    assert turned.p == pytest.approx(0.95, abs=1e-4)


def test_the_order_of_the_pairs_does_not_matter():
    turned = dict(reversed(WORSE.items()))
    (shuffled,), (found,) = compare(BEST, {"w": turned}), compare(BEST, {"w": WORSE})
    assert shuffled == found


def test_equal_differences_are_judged_by_their_signs():
    def p(difference):
        other = {pair: accuracy - difference for pair, accuracy in BEST.items()}
        (found,) = compare(BEST, {"other": other})
        return found.p

    assert p(0.1) == p(0.3) == 1 / 64
    assert p(0.0) == p(-0.1) == 1.0


def test_a_known_effect_is_found_and_grows_surer_with_its_size():
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.01, len(PAIRS))
    rivals = {str(e): paired(0.6 + noise - e) for e in (0.0, 0.01, 0.03, 0.1)}
    candidate = paired(0.6 + generator.normal(0, 0.01, len(PAIRS)))
    p_values = [found.p for found in compare(candidate, rivals)]
    assert p_values == sorted(p_values, reverse=True)
    assert p_values[-1] < 0.001


def test_without_any_effect_few_families_have_a_false_winner():
    """The candidate and its three rivals are alike; the candidate's noise is in all three tests."""
    generator = np.random.default_rng(1)
    wins = raw = 0
    for _ in range(2000):
        candidate, *rivals = (paired(row) for row in generator.normal(0.5, 0.02, (4, 6)))
        found = compare(candidate, dict(zip("xyz", rivals, strict=True)))
        wins += min(row.adjusted for row in found) <= 0.05
        raw += min(row.p for row in found) <= 0.05
    assert wins / 2000 <= 0.05 + 2 * 0.005
    # it is the adjustment that does it
    assert raw / 2000 > 0.07


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferronis(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= min(1, len(p_values) * p) for p, a in zip(p_values, adjusted, strict=True))
    assert min(adjusted) == min(1, len(p_values) * min(p_values))
    both = list(zip(p_values, adjusted, strict=True))
    for (p, a), (q, b) in itertools.permutations(both, 2):
        assert a <= b or p > q


def test_seeds_on_one_base_network_make_nothing_surer():
    """Ten seeds that agree count as one: p is that of the networks' means."""
    generator = np.random.default_rng(2)
    networks, seeds = "abc", range(10)
    gaps = dict(zip(networks, (0.01, 0.02, -0.004), strict=True))
    noise = {(n, s): generator.normal(0, 0.01) for n in networks for s in seeds}
    rival = dict.fromkeys(noise, 0.5)
    candidate = {(n, s): 0.5 + gaps[n] + noise[n, s] for n, s in noise}
    (found,) = compare(candidate, {"rival": rival})
    means = [np.mean([candidate[n, s] - 0.5 for s in seeds]) for n in networks]
    assert found.p == pytest.approx(stats.ttest_1samp(means, 0, alternative="greater").pvalue)
    assert found.networks == 3
    twice = {(n, s + 10 * k): value for (n, s), value in candidate.items() for k in (0, 1)}
    (again,) = compare(twice, {"rival": dict.fromkeys(twice, 0.5)})
    assert again.p == pytest.approx(found.p)


# --- certificates ---------------------------------------------------------------------------------


def rows(**policies) -> list[Evidence]:
    """Evidence of some policies, a row for each base network, dense ones first."""
    found = []
    for policy, accuracies in {"base": dict.fromkeys(PAIRS, 0.9), **policies}.items():
        for (network, seed), accuracy in accuracies.items():
            found.append(
                Evidence(
                    policy, 1, 1, accuracy, 0.0, (seed,), (accuracy,), "fine-tuned", "data",
                    network=network,
                )
            )  # fmt: skip
    return found


def certified(accuracy=0.7, random=tuple(0.001 * n for n in range(200)), **rivals) -> Certificate:
    found = {"searched": BEST, **(rivals or {"equal": WORSE})}
    return certify(rows(**found), [rank(accuracy, random, data="tiny, validation split")])


def test_a_certificate_needs_the_rank_and_every_rival():
    assert certified().passes
    assert not certified(accuracy=0.19).passes
    assert not certified(equal=WORSE, greedy=TIED).passes
    assert not certified(equal=BEST).passes


def test_a_sibling_is_trained_once_for_each_base_network():
    """Its seed is no pair's: the candidate's mean over seeds is compared with it."""
    own = {(n, s): 0.7 + 0.01 * k + 0.03 * s for k, n in enumerate("abc") for s in (0, 1)}
    once = {("a", 7): 0.69, ("b", 8): 0.71, ("c", 9): 0.68}
    ranks = [rank(0.7, [0.1] * 200)]
    (found,) = certify(rows(searched=own, sibling=once), ranks).comparisons
    differences = [0.715 - 0.69, 0.725 - 0.71, 0.735 - 0.68]
    assert found.p == pytest.approx(stats.ttest_1samp(differences, 0, alternative="greater").pvalue)
    del once["c", 9]
    with pytest.raises(ZooError, match="not paired"):
        certify(rows(searched=own, sibling=once), ranks)


def test_a_rival_that_does_not_reach_the_factor_on_every_network_is_left_out():
    part = dict(list(WORSE.items())[1:])
    kept = everywhere(rows(base=BEST, searched=BEST, equal=WORSE, part=part, sibling=part))
    assert {row.policy for row in kept} == {"base", "searched", "equal", "sibling"}
    own = everywhere(rows(searched=BEST, equal=WORSE, part=part))
    (found,) = certify(own, [rank(0.7, [0.1] * 200)]).comparisons
    assert (found.rival, found.networks) == ("equal", 6)


def test_every_rank_must_pass():
    good, bad = rank(0.7, [0.1] * 200), rank(0.7, [0.9] * 200)
    own = rows(searched=BEST, equal=WORSE)
    assert certify(own, [good, good]).passes
    assert not certify(own, [good, bad]).passes


def test_the_verdict_names_what_is_not_proven():
    assert certified().verdict == (
        "Certified: surely among the best 5% of random profiles on 1 base network, and ahead of "
        "1 rival over 6 base networks."
    )
    told = certified(random=[0.8] * 4 + [0.1] * 196, equal=WORSE, greedy=TIED).verdict
    assert told.startswith("Provisional: not surely among the best 5% of random profiles on tiny,")
    assert "(4 of 200 are as good)" in told
    assert "not surely ahead of greedy (" in told
    assert "equal" not in told


def test_the_thresholds_decide():
    found = certified()
    (comparison,) = found.comparisons
    assert not dataclasses.replace(found, max_rank=0.01).passes
    assert dataclasses.replace(certified(accuracy=0.19), max_rank=0.2).passes
    assert dataclasses.replace(found, alpha=comparison.adjusted).passes
    assert not dataclasses.replace(found, alpha=comparison.adjusted / 2).passes


@pytest.mark.parametrize(("better", "passes"), [(0, True), (3, True), (4, False)])
def test_at_most_three_of_two_hundred_may_be_as_good(better, passes):
    assert certified(random=[0.8] * better + [0.1] * (200 - better)).passes is passes


def test_no_candidate_is_better_than_too_few_random_profiles_can_show():
    assert certified(random=[0.1] * 72).passes
    assert not certified(random=[0.1] * 71).passes


def test_a_certificate_survives_json():
    found = certified(accuracy=0.9, random=np.linspace(0, 1, 50), equal=WORSE, greedy=TIED)
    assert decode(Certificate, json.loads(json.dumps(encode(found))), "certificate") == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random": []}, "there are none"),
        ({"random": [0.5, math.nan]}, "random profile is nan"),
        ({"accuracy": math.nan}, "candidate is nan"),
        ({"searched": paired([0.5]), "equal": WORSE}, "at least two base networks, got 1"),
        ({"equal": paired([0.5] * 5)}, r"'equal'.*\('f', 0\).* the candidate alone"),
        ({"searched": paired([0.5] * 5), "equal": WORSE}, r"'equal'.*\('f', 0\).* the rival alone"),
        ({"equal": WORSE | {("a", 0): math.nan}}, "of equal is nan"),
        ({"searched": BEST | {("a", 0): 71.0}, "equal": WORSE}, "candidate is 71"),
    ],
)
def test_what_cannot_be_certified_is_one_error(changes, message):
    with pytest.raises(ZooError, match=message):
        certified(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "alpha=0"),
        ({"max_rank": math.nan}, "max_rank=nan"),
        ({"ranks": ()}, "a rank and a rival"),
        ({"comparisons": ()}, "a rank and a rival"),
    ],
)
def test_a_document_that_proves_nothing_is_refused(changes, message):
    with pytest.raises(ZooError, match=message):
        dataclasses.replace(certified(), **changes)


def test_nothing_is_certified_without_ranks_or_rivals():
    with pytest.raises(ZooError, match="no rivals"):
        certify(rows(searched=BEST), [rank(0.7, [0.1] * 200)])
    with pytest.raises(ZooError, match="needs a rank"):
        certify(rows(searched=BEST, equal=WORSE), [])
