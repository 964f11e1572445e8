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
"""(base network, seed): accuracies of candidate and rival are paired by it."""

NO_SPREAD = 1e-9
"""Differences with a standard deviation up to this are equal up to rounding."""


@dataclass(frozen=True)
class Rank:
    """How many random profiles at the same factor are at least as good, ties included.

    Attributes:
        profiles: number of random profiles.
        at_least_as_good: how many of them reached the candidate's accuracy.
        probability: their share, the estimated probability that a random profile is as good.
        low, high: exact two-sided 95 % confidence interval of `probability`.
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
        sd: standard deviation of the differences, dividing by n - 1.
        p: of the one-sided paired t-test, whose null hypothesis is that the candidate is no better.
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
    """The result of `certify`, and the thresholds of its verdict.

    Attributes:
        max_rank: largest upper end of the rank's interval that passes.
        alpha: largest adjusted p that passes.
    """

    rank: Rank
    comparisons: tuple[Comparison, ...]
    max_rank: float
    alpha: float

    @property
    def passes(self) -> bool:
        """Whether it is surely in the best `max_rank` of random profiles, and beats all rivals."""
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

    With the default thresholds, at most 3 of 200 random profiles may be as good, or 0 of 72. With
    fewer than 72, no candidate can pass.

    Args:
        candidate: (base network, seed) -> its accuracy in [0, 1].
        rivals: name -> the same for a rival, over exactly the same pairs.
        accuracy: the candidate's, at the fidelity of `random`, which may differ from the pairs'.
        random: accuracies of random profiles at the same factor, drawn independently of the search.
        max_rank, alpha: as in `Certificate`.

    Raises:
        ZooError: for pairs that differ or are fewer than two, no rivals, no random profiles, an
            accuracy that is not a number in [0, 1], or a threshold that is not in (0, 1).
    """
    for name, threshold in {"max_rank": max_rank, "alpha": alpha}.items():
        if not 0 < threshold < 1:
            raise ZooError(f"{name}={threshold}: a certificate's threshold must be in (0, 1).")
    return Certificate(rank(accuracy, random), compare(candidate, rivals), max_rank, alpha)


def rank(accuracy: float, random: Sequence[float]) -> Rank:
    """The rank among random profiles, with its interval (Clopper and Pearson, 1934).

    Raises:
        ZooError: for no random profiles, or an accuracy that is not a number in [0, 1].
    """
    if len(random) == 0:
        raise ZooError("A rank needs at least one random profile: there are none.")
    _check([accuracy], "the candidate")
    _check(random, "a random profile")
    n, k = len(random), sum(bool(other >= accuracy) for other in random)
    low = betaincinv(k, n - k + 1, 0.025) if k else 0.0
    high = betaincinv(k + 1, n - k, 0.975) if k < n else 1.0
    return Rank(n, k, k / n, float(low), float(high))


def compare(
    candidate: Mapping[Pair, float], rivals: Mapping[str, Mapping[Pair, float]]
) -> tuple[Comparison, ...]:
    """One-sided paired t-tests against every rival, in their order, with Holm's correction.

    A test assumes that the pairs are independent, and holds for their base networks only. If all
    differences are equal, t would divide by zero: p is then that of the exact sign test, 2⁻ⁿ for n
    differences above zero, and 1 otherwise.

    Raises:
        ZooError: for pairs that differ or are fewer than two, no rivals, or an accuracy that is
            not a number in [0, 1].
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
    """The p-value of a one-sided t-test; its null hypothesis is that the mean is not above zero."""
    n, mean, sd = len(differences), statistics.fmean(differences), statistics.stdev(differences)
    if sd <= NO_SPREAD:
        return 0.5**n if mean > NO_SPREAD else 1.0
    return float(stdtr(n - 1, -mean / sd * math.sqrt(n)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction (1979), in the same order.

    Rejecting every hypothesis whose adjusted p is at most α gives a false rejection with
    probability at most α, however the tests depend on each other.
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
