"""`best`: what the evidence puts first (docs/evidence.md, "Where nothing was searched").

With labelled images that is a policy that looks at the network's own channels; without, the
searched profile, or where there is none a policy.
"""

from __future__ import annotations

from zoo.planning.learned import LEARNED, learned_policy
from zoo.planning.rankings import BEST_RANKING
from zoo.registry.store import get_profile, searched_profile
from zoo.spec.profile import Profile

__all__ = ["BEST", "best_policies", "best_profile", "reason"]

BEST = "best"

WITH_DATA = {
    "params": (LEARNED, BEST_RANKING["params"]),
    "macs": (LEARNED, BEST_RANKING["macs"]),
    "latency": (BEST_RANKING["latency"],),
}
"""Metric -> the policies with images, each for where those before it do not work."""

WITHOUT_DATA = ("global-lamp", "equal")
"""The policies without images, each for where those before it do not work."""


def best_profile(
    arch: str, cf: float | None, metric: str, *, data: bool
) -> tuple[str, Profile] | None:
    """(reference, profile) of the bundled profile; None without one, or where images rank first."""
    if not arch or cf is None or data:
        return None
    return searched_profile(arch, cf, metric)


def best_policies(metric: str, cf: float, *, data: bool) -> tuple[str, ...]:
    """The policies to try in turn where nothing was searched.

    The learned policy is among them at the factors that it was trained for.

    Args:
        metric: what the factor counts.
        cf: the factor.
        data: whether there are labelled images to score channels with.
    """
    found = (*(WITH_DATA[metric] if data else ()), *WITHOUT_DATA)
    if LEARNED in found and not learned_policy().training.covers(cf):
        return tuple(name for name in found if name != LEARNED)
    return found


def reason(name: str, metric: str, cf: float) -> str:
    """One line: what `best` took, with what evidence, and what else there is.

    Args:
        name: of the profile or policy that was taken.
        metric: what the factor counts.
        cf: the factor.
    """
    first, *_ = best_policies(metric, cf, data=True)
    better = f"with data, {first!r} looks at the channels of these weights instead"
    if ":" in name:
        profile = get_profile(name)
        exams = len({row.exam for row in profile.evidence})
        networks = f"{exams} network{'s' if exams > 1 else ''} of {profile.architecture}"
        evidence = f"measured on {networks} that it did not see" if exams else "not measured"
        return f"best took {name}: found by a search on other data, {evidence}; {better}."
    if name == LEARNED:
        seen = ", ".join(learned_policy().training.architectures)
        return (
            f"best took {name!r}, trained by reinforcement learning on {seen} (docs/evidence.md)."
        )
    if name in WITH_DATA[metric]:
        outside = ""
        if LEARNED in WITH_DATA[metric] and first != LEARNED:
            factors = learned_policy().training.factors
            outside = f"; {LEARNED!r} was trained for {min(factors):g}x to {max(factors):g}x alone"
        return (
            f"best took {name!r}, which ranks the channels of these weights "
            f"(docs/evidence.md){outside}."
        )
    return f"best took {name!r}: nothing was searched for this network and factor; {better}."
