"""`best`: what the evidence puts first (docs/evidence.md, "Where nothing was searched").

With labelled images that is a policy that looks at the network's own channels; without, the
searched profile, or where there is none a policy.
"""

from __future__ import annotations

from zoo.errors import ZooError
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


def reason(name: str, metric: str, cf: float, *, data: bool) -> str:
    """One line: what `best` took, with what evidence, and what else there is.

    Args:
        name: of the profile or policy that was taken.
        metric: what the factor counts.
        cf: the factor.
        data: whether there were labelled images.
    """
    if data:
        return f"best took {name!r}{_with_data(name, metric, cf)}."
    better = f"with data, {_first(metric, cf)!r} looks at the channels of these weights instead"
    if ":" in name:
        profile = get_profile(name)
        exams = len({row.exam for row in profile.evidence})
        networks = f"{exams} network{'s' if exams > 1 else ''} of {profile.architecture}"
        evidence = f"measured on {networks} that it did not see" if exams else "not measured"
        return f"best took {name}: found by a search on other data, {evidence}; {better}."
    return f"best took {name!r}: nothing was searched for this network and factor; {better}."


def _with_data(name: str, metric: str, cf: float) -> str:
    first = _first(metric, cf)
    if name not in WITH_DATA[metric]:
        return f": the policies that need data do not work here, as profile={first!r} would say"
    evidence = "never measured by latency" if metric == "latency" else "docs/evidence.md"
    if name == LEARNED:
        seen = ", ".join(learned_policy().training.architectures)
        return f", trained by reinforcement learning on {seen} ({evidence})"
    outside = ""
    if LEARNED in WITH_DATA[metric] and first != LEARNED:
        factors = learned_policy().training.factors
        outside = f"; {LEARNED!r} was trained for {min(factors):g}x to {max(factors):g}x alone"
    return f", which ranks the channels of these weights ({evidence}){outside}"


def _first(metric: str, cf: float) -> str:
    """The best policy with data; without a sound learned policy, the next."""
    try:
        return best_policies(metric, cf, data=True)[0]
    except ZooError:
        return BEST_RANKING[metric]
