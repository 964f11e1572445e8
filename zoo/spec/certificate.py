"""Certificates: what a profile's evidence proves against chance and its rivals. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.errors import DocumentError

__all__ = ["Certificate", "Comparison", "Rank"]


@dataclass(frozen=True)
class Rank:
    """How many random profiles at the same factor are at least as good, ties included.

    Attributes:
        data, fidelity: what was measured on, and how.
        profiles: number of random profiles.
        at_least_as_good: how many of them reached the profile's accuracy.
        low, high: exact two-sided 95 % confidence interval of the probability that a random profile
            is as good.
        network: sha256 of the base network.
        draws: choices of channels that the profile's accuracy is the mean of; each random profile
            has one.
    """

    data: str
    fidelity: str
    profiles: int
    at_least_as_good: int
    low: float
    high: float
    network: str = ""
    draws: int = 1

    @property
    def probability(self) -> float:
        """The estimated probability that a random profile is as good."""
        return self.at_least_as_good / self.profiles


@dataclass(frozen=True)
class Comparison:
    """The profile against one rival, over the same base networks and seeds.

    Attributes:
        rival: its policy.
        networks: base networks, over each of which the seeds' differences are averaged.
        difference: mean of profile minus rival over the networks, as accuracies in [0, 1].
        sd: standard deviation of the networks' differences, dividing by n - 1.
        p: of the one-sided t-test over the networks, whose null hypothesis is that the profile is
            no better.
        adjusted: `p` after Holm's correction for the number of rivals.
    """

    rival: str
    networks: int
    difference: float
    sd: float
    p: float
    adjusted: float


@dataclass(frozen=True)
class Certificate:
    """Ranks and comparisons, and the thresholds of their verdict.

    Attributes:
        ranks: among random profiles, one for each base network that it was ranked on.
        comparisons: with every rival.
        max_rank: largest upper end of a rank's interval that passes.
        alpha: largest adjusted p that passes.
    """

    ranks: tuple[Rank, ...]
    comparisons: tuple[Comparison, ...]
    max_rank: float = 0.05
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not self.ranks or not self.comparisons:
            raise DocumentError("A certificate needs a rank and a rival.")
        for name in ("max_rank", "alpha"):
            if not 0 < (threshold := getattr(self, name)) < 1:
                raise DocumentError(f"{name}={threshold}: a threshold must be in (0, 1).")

    @property
    def passes(self) -> bool:
        """Whether it is surely in the best `max_rank` of random profiles, and beats all rivals."""
        return not self._low_ranks and not self._unbeaten

    @property
    def verdict(self) -> str:
        """The result in a sentence or two; a profile that does not pass is provisional."""
        rivals, networks = len(self.comparisons), self.comparisons[0].networks
        share = f"among the best {self.max_rank:.0%} of random profiles"
        if self.passes:
            return (
                f"Certified: surely {share} on {_counted(len(self.ranks), 'base network')}, and "
                f"ahead of {_counted(rivals, 'rival')} over {_counted(networks, 'base network')}."
            )
        reasons = [
            f"not surely {share} on {rank.data} ({rank.at_least_as_good} of {rank.profiles} are as "
            "good)"
            for rank in self._low_ranks
        ]
        if self._unbeaten:
            names = ", ".join(
                f"{each.rival} ({100 * each.difference:+.2f} points, p {each.adjusted:.2g})"
                for each in self._unbeaten
            )
            reasons.append(f"over {_counted(networks, 'base network')} not surely ahead of {names}")
        return f"Provisional: {'; '.join(reasons)}."

    @property
    def _low_ranks(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.high > self.max_rank]

    @property
    def _unbeaten(self) -> list[Comparison]:
        return [each for each in self.comparisons if each.adjusted > self.alpha]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
