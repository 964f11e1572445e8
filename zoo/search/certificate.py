"""Certificates of profiles from their evidence: exact ranks, and tests against every rival."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from zoo.errors import ZooError
from zoo.spec.certificate import Certificate, Comparison, Rank
from zoo.spec.profile import SIBLING, Evidence

try:
    from scipy.special import betaincinv, stdtr
except ImportError:
    raise ZooError("Certificates need SciPy: pip install 'prunezoo[search]'.") from None

__all__ = ["Pair", "certify", "compare", "everywhere", "holm", "rank"]

Pair = tuple[str, int]
"""(base network, seed): accuracies of candidate and rival are paired by it."""

NO_SPREAD = 1e-9
"""Differences with a standard deviation up to this are equal up to rounding."""


def certify(
    evidence: Iterable[Evidence], ranks: Iterable[Rank], *, policy: str = "searched"
) -> Certificate:
    """The certificate of a profile: its ranks, and tests against all other policies.

    With the default thresholds, at most 3 of 200 random profiles may be as good, or 0 of 72. With
    fewer than 72, no profile can pass.

    Args:
        evidence: rows of the profile and its rivals, over the same base networks and seeds; those
            of the dense networks are left out.
        ranks: made by `rank`, on base networks that the search did not see.
        policy: that of the profile's own rows.

    Raises:
        ZooError: for no ranks, or as `compare`.
    """
    pairs: dict[str, dict[Pair, float]] = defaultdict(dict)
    for row in evidence:
        if row.policy != "base":
            measured = zip(row.seeds, row.accuracies, strict=True)
            pairs[row.policy] |= {(row.network, seed): accuracy for seed, accuracy in measured}
    own = pairs.pop(policy, {})
    if SIBLING in pairs:  # trained once for each base network
        once = {network: accuracy for (network, _), accuracy in pairs[SIBLING].items()}
        pairs[SIBLING] = {pair: once[pair[0]] for pair in own if pair[0] in once}
    found = tuple(ranks)
    if not found:
        raise ZooError("A certificate needs a rank among random profiles: there is none.")
    return Certificate(found, compare(own, pairs))


def everywhere(evidence: Iterable[Evidence]) -> list[Evidence]:
    """The rows without those of policies that do not reach the factor on every base network."""
    rows = list(evidence)
    networks = {row.network for row in rows}
    reached: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        reached[row.policy].add(row.network)
    return [row for row in rows if row.policy == SIBLING or reached[row.policy] == networks]


def rank(
    accuracy: float, random: Sequence[float], *, data: str = "", fidelity: str = "",
    network: str = "", draws: int = 1,
) -> Rank:  # fmt: skip
    """The rank among random profiles, with its interval (Clopper and Pearson, 1934).

    Args:
        accuracy: of the profile, the mean over `draws` choices of channels.
        random: accuracies of random profiles at the same factor, drawn independently of the search.
        data, fidelity, network, draws: as in `Rank`.

    Raises:
        ZooError: for no random profiles, or an accuracy that is not a number in [0, 1].
    """
    if len(random) == 0:
        raise ZooError("A rank needs at least one random profile: there are none.")
    _check([accuracy], "the candidate")
    _check(random, "a random profile")
    n, k = len(random), sum(bool(other >= accuracy) for other in random)
    low = float(betaincinv(k, n - k + 1, 0.025)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 0.975)) if k < n else 1.0
    return Rank(data, fidelity, n, k, low, high, network, draws)


def compare(
    candidate: Mapping[Pair, float], rivals: Mapping[str, Mapping[Pair, float]]
) -> tuple[Comparison, ...]:
    """One-sided t-tests against every rival, in their order, with Holm's correction.

    Seeds on one base network depend on each other, so that their differences are averaged: what
    must be independent are the networks alone. If all networks differ equally, t would divide by
    zero: p is then that of the exact sign test, 2⁻ⁿ for n differences above zero, and 1 otherwise.

    Raises:
        ZooError: for pairs that differ or are of fewer than two base networks, no rivals, or an
            accuracy that is not a number in [0, 1].
    """
    if not rivals:
        raise ZooError("There are no rivals to compare the candidate with.")
    networks = {network for network, _ in candidate}
    if len(networks) < 2:
        raise ZooError(f"A test needs at least two base networks, got {len(networks)}.")
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
        differences = defaultdict(list)
        for (network, seed), accuracy in candidate.items():
            differences[network].append(accuracy - rival[network, seed])
        means = [statistics.fmean(own) for own in differences.values()]
        found.append((name, means, _p(means)))
    adjusted = holm([p for *_, p in found])
    return tuple(
        Comparison(name, len(ds), statistics.fmean(ds), statistics.stdev(ds), p, after)
        for (name, ds, p), after in zip(found, adjusted, strict=True)
    )


def _p(differences: Sequence[float]) -> float:
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
