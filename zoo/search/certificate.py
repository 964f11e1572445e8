"""Certificates: a profile's evidence on data that its search never saw. Numbers in, no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from zoo.errors import ZooError

try:
    from scipy.special import betaincinv, stdtr
except ImportError:
    raise ZooError("Certificates need SciPy: pip install 'prunezoo[search]'.") from None

__all__ = ["Certificate", "Comparison", "Pair", "Rank", "certify", "compare", "holm", "rank"]

Pair = tuple[str, int]
"""(base network, seed): what accuracies are paired by."""

NO_SPREAD = 1e-9
"""Differences that spread no more than this are all equal, but for rounding."""


@dataclass(frozen=True)
class Rank:
    """How rarely a random profile at the same factor is at least as good; ties count as such.

    Attributes:
        profiles: how many random ones there were.
        at_least_as_good: how many of them reached the candidate's accuracy.
        probability: that share, the estimate of the probability that a random profile does.
        low, high: its exact two-sided 95 % interval.
    """

    profiles: int
    at_least_as_good: int
    probability: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The candidate against one rival, over the same (base network, seed) pairs.

    Attributes:
        difference: mean of candidate minus rival, as accuracies in [0, 1].
        sd: of the differences, dividing by n - 1.
        p: of the one-sided paired t-test that the candidate is no better.
        adjusted: `p` after Holm's correction for the number of rivals.
    """

    rival: str
    pairs: int
    difference: float
    sd: float
    p: float
    adjusted: float


@dataclass(frozen=True)
class Certificate:
    """What `certify` found, with the thresholds that its verdict keeps to.

    Attributes:
        max_rank: the most that the upper end of the rank's interval may be.
        alpha: the most that an adjusted p may be.
    """

    rank: Rank
    comparisons: tuple[Comparison, ...]
    max_rank: float
    alpha: float

    @property
    def passes(self) -> bool:
        """Surely among the best `max_rank` of random profiles, and better than every rival."""
        better = all(comparison.adjusted <= self.alpha for comparison in self.comparisons)
        return self.rank.high <= self.max_rank and better


def certify(
    candidate: Mapping[Pair, float],
    rivals: Mapping[str, Mapping[Pair, float]],
    accuracy: float,
    random: Sequence[float],
    *,
    max_rank: float = 0.05,
    alpha: float = 0.05,
) -> Certificate:
    """The evidence for a candidate: its rank among random profiles, and tests against rivals.

    With the default thresholds, at most 3 of 200 random profiles may be as good, 0 of 72, and with
    fewer than 72 none can pass.

    Args:
        candidate: (base network, seed) -> its accuracy in [0, 1].
        rivals: name -> the same for a rival, over exactly the same pairs.
        accuracy: the candidate's, measured as the random profiles' were, perhaps at another
            fidelity than the pairs.
        random: accuracies of random profiles at the same factor, drawn apart from the search.
        max_rank, alpha: as in `Certificate`.

    Raises:
        ZooError: for pairs that differ or are fewer than two, no rivals, no random profiles, an
            accuracy that is not a number in [0, 1], or a threshold that is not in (0, 1).
    """
    for name, threshold in {"max_rank": max_rank, "alpha": alpha}.items():
        if not 0 < threshold < 1:
            raise ZooError(f"{name}={threshold}: a threshold of a certificate is in (0, 1).")
    return Certificate(rank(accuracy, random), compare(candidate, rivals), max_rank, alpha)


def rank(accuracy: float, random: Sequence[float]) -> Rank:
    """The rank among random profiles, with its interval (Clopper and Pearson, 1934).

    Raises:
        ZooError: for no random profiles, or what is no accuracy in [0, 1].
    """
    if len(random) == 0:
        raise ZooError("A rank among random profiles needs some: there are none.")
    _check([accuracy], "the candidate")
    _check(random, "a random profile")
    n, k = len(random), sum(bool(other >= accuracy) for other in random)
    low = betaincinv(k, n - k + 1, 0.025) if k else 0.0
    high = betaincinv(k + 1, n - k, 0.975) if k < n else 1.0
    return Rank(n, k, k / n, float(low), float(high))


def compare(
    candidate: Mapping[Pair, float], rivals: Mapping[str, Mapping[Pair, float]]
) -> tuple[Comparison, ...]:
    """One-sided paired t-tests against every rival, Holm-adjusted over them; rivals keep order.

    A test takes pairs as independent, and speaks for the base networks among them. Where all
    differences are equal, t has no denominator: p is then the exact sign test's, 2⁻ⁿ for n
    differences above zero, and 1 for any others.

    Raises:
        ZooError: for pairs that differ or are fewer than two, no rivals, or what is no accuracy in
            [0, 1].
    """
    if not rivals:
        raise ZooError("There are no rivals to compare the candidate with.")
    if len(candidate) < 2:
        raise ZooError(
            f"A paired test needs at least two (base network, seed) pairs, got {len(candidate)}."
        )
    _check(candidate.values(), "the candidate")
    found = []
    for name, rival in rivals.items():
        if odd := sorted(candidate.keys() ^ rival.keys()):
            which = "the candidate" if odd[0] in candidate else "the rival"
            raise ZooError(
                f"The candidate and the rival {name!r} are not paired: {odd[0]} was measured for "
                f"{which} alone."
            )
        _check(rival.values(), name)
        differences = [accuracy - rival[pair] for pair, accuracy in candidate.items()]
        found.append((name, differences, _paired_p(differences)))
    adjusted = holm([p for *_, p in found])
    return tuple(
        Comparison(name, len(ds), statistics.fmean(ds), statistics.stdev(ds), p, after)
        for (name, ds, p), after in zip(found, adjusted, strict=True)
    )


def _paired_p(differences: Sequence[float]) -> float:
    """Of a one-sided t-test that their mean is not above zero."""
    n, mean, sd = len(differences), statistics.fmean(differences), statistics.stdev(differences)
    if sd <= NO_SPREAD:
        return 0.5**n if mean > NO_SPREAD else 1.0
    return float(stdtr(n - 1, -mean / sd * math.sqrt(n)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the same order (Holm, 1979).

    Rejecting what is at most α keeps the probability of any false rejection at most α, however the
    tests depend on each other.
    """
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = least
    return adjusted


def _check(accuracies: Iterable[float], whose: str) -> None:
    for accuracy in accuracies:
        if not 0 <= accuracy <= 1:
            raise ZooError(f"An accuracy of {whose} is {accuracy}; it must be in [0, 1].")
