"""`best`: what the evidence puts first (docs/evidence.md).

With labelled images that is a policy that looks at the network's own channels; without, the
searched profile, or where there is none a policy. Where another of these was clearly ahead on base
networks of the very architecture, it takes their place.
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

SEARCHED = "searched"
CLEARLY = 0.01
"""Least lead, of mean accuracies over base networks, of what takes the usual one's place."""


def best_profile(
    arch: str, cf: float | None, metric: str, *, data: bool
) -> tuple[str, Profile] | None:
    """(reference, profile) of the bundled profile; None without one, or where others rank first."""
    found = _found(arch, cf, metric)
    first = _ahead(found, metric, data)
    return found if first == SEARCHED or not (first or data) else None


def best_policies(metric: str, cf: float, *, data: bool, arch: str = "") -> tuple[str, ...]:
    """The policies to try in turn where no profile is taken.

    The learned policy is among them at the factors that it was trained for.

    Args:
        metric: what the factor counts.
        cf: the factor.
        data: whether there are labelled images to score channels with.
        arch: the architecture, whose own evidence comes before that of others.
    """
    found = (*(WITH_DATA[metric] if data else ()), *WITHOUT_DATA)
    if LEARNED in found and not learned_policy().training.covers(cf):
        found = tuple(name for name in found if name != LEARNED)
    first = _ahead(_found(arch, cf, metric), metric, data)
    return (first, *(name for name in found if name != first)) if first in found else found


def _found(arch: str, cf: float | None, metric: str) -> tuple[str, Profile] | None:
    return searched_profile(arch, cf, metric) if arch and cf is not None else None


def _ahead(found: tuple[str, Profile] | None, metric: str, data: bool) -> str | None:
    """What the certificate of `found` has clearly ahead of the usual one; None without any."""
    if found is None or found[1].certificate is None:
        return None
    behind = {each.rival: each.difference for each in found[1].certificate.comparisons}
    behind[SEARCHED] = 0.0
    names: list[str] = [*(WITH_DATA[metric] if data else ()), SEARCHED, *WITHOUT_DATA]
    if names[0] not in behind:
        return None
    first = min((name for name in names if name in behind), key=behind.__getitem__)
    return first if behind[names[0]] - behind[first] > CLEARLY else None


def reason(name: str, metric: str, cf: float, *, data: bool, arch: str = "") -> str:
    """One line: what `best` took, with what evidence, and what else there is.

    Args:
        name: of the profile or policy that was taken.
        metric: what the factor counts.
        cf: the factor.
        data: whether there were labelled images.
        arch: the architecture, if it has a name.
    """
    first = _ahead(_found(arch, cf, metric), metric, data)
    if first == name or (first == SEARCHED and ":" in name):
        usual = WITH_DATA[metric][0] if data else SEARCHED
        return (
            f"best took {name!r}: at {cf:g}x {metric} it was ahead of {usual!r} on networks that "
            f"no search saw (zoo show {arch} --cf {cf:g} --metric {metric})."
        )
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
