"""`best`: the searched profile where there is one, else the policy that the evidence puts first.

The order is that of docs/evidence.md ("Where nothing was searched").
"""

from __future__ import annotations

from zoo.errors import FactorError
from zoo.registry.store import find_profile, get_profile
from zoo.spec.profile import Profile

__all__ = ["BEST", "best_policies", "best_profile", "reason"]

BEST = "best"

WITH_DATA = {"params": "global-fisher", "macs": "knapsack", "latency": "knapsack"}
"""Metric -> the policy for labelled images of the user's own."""

BETTER_WITH_DATA = ("macs", "latency")
"""Metrics by which the policy for labelled images beats the searched profiles too."""

WITHOUT_DATA = ("increasing", "equal")
"""The policies without images: the second where the first cannot reach the factor."""


def best_profile(
    arch: str, cf: float | None, metric: str, *, data: bool
) -> tuple[str, Profile] | None:
    """(reference, profile) of the bundled profile; None where there is none, or a better policy."""
    if not arch or cf is None or (data and metric in BETTER_WITH_DATA):
        return None
    try:
        return find_profile(arch, cf, metric)
    except FactorError:
        return None


def best_policies(metric: str, *, data: bool) -> tuple[str, ...]:
    """The policies to try in turn where nothing was searched.

    Args:
        metric: what the factor counts.
        data: whether there are labelled images to score channels with.
    """
    return (WITH_DATA[metric],) if data else WITHOUT_DATA


def reason(name: str, metric: str) -> str:
    """One line: what `best` took, with what evidence, and what else there is.

    Args:
        name: of the profile or policy that was taken.
        metric: what the factor counts.
    """
    better = f"with data, {WITH_DATA[metric]!r} ranks the channels of these weights instead"
    if ":" in name:
        exams = len({row.exam for row in get_profile(name).evidence})
        evidence = f"measured on {exams} networks that it did not see" if exams else "not measured"
        return f"best took {name}: found by a search on other data, {evidence}; {better}."
    if name in WITHOUT_DATA:
        return f"best took {name!r}: nothing was searched for this network and factor; {better}."
    return f"best took {name!r}, which ranks the channels of these weights (docs/evidence.md)."
