"""`best`: what the evidence puts first (docs/evidence.md, "Where nothing was searched").

With labelled images that is the ranking of the network's own channels; without, the searched
profile, or where there is none a policy.
"""

from __future__ import annotations

from zoo.planning.rankings import BEST_RANKING
from zoo.registry.store import get_profile, searched_profile
from zoo.spec.profile import Profile

__all__ = ["BEST", "best_policies", "best_profile", "reason"]

BEST = "best"

WITHOUT_DATA = {
    "params": ("global-lamp", "increasing", "equal"),
    "macs": ("global-bn", "increasing", "equal"),
    "latency": ("global-bn", "increasing", "equal"),
}
"""Metric -> the policies without images, each for where those before it do not work."""


def best_profile(
    arch: str, cf: float | None, metric: str, *, data: bool
) -> tuple[str, Profile] | None:
    """(reference, profile) of the bundled profile; None without one, or where images rank first."""
    if not arch or cf is None or data:
        return None
    return searched_profile(arch, cf, metric)


def best_policies(metric: str, *, data: bool) -> tuple[str, ...]:
    """The policies to try in turn where nothing was searched.

    Args:
        metric: what the factor counts.
        data: whether there are labelled images to score channels with.
    """
    return (*((BEST_RANKING[metric],) if data else ()), *WITHOUT_DATA[metric])


def reason(name: str, metric: str) -> str:
    """One line: what `best` took, with what evidence, and what else there is.

    Args:
        name: of the profile or policy that was taken.
        metric: what the factor counts.
    """
    better = f"with data, {BEST_RANKING[metric]!r} ranks the channels of these weights instead"
    if ":" in name:
        exams = len({row.exam for row in get_profile(name).evidence})
        evidence = f"measured on {exams} networks that it did not see" if exams else "not measured"
        return f"best took {name}: found by a search on other data, {evidence}; {better}."
    if name == BEST_RANKING[metric]:
        return f"best took {name!r}, which ranks the channels of these weights (docs/evidence.md)."
    return f"best took {name!r}: nothing was searched for this network and factor; {better}."
