"""What the evidence of a profile shows, and what it does not show, in sentences."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from zoo.publishing.catalogue import CataloguedArchitecture, CataloguedProfile, Exam
from zoo.spec.profile import SIBLING, STANDARD, Evidence

__all__ = ["RULE", "limits", "percent", "shows", "spread"]

RULE = (
    "Ahead and behind are differences that a two-sided t-test over the seeds tells from chance at "
    "5 %, each test alone; those that it does not are not told apart."
)
"""The rule behind `shows`."""

T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t at 1, 2, ... degrees of freedom; more count as the last."""

RIVALS = {
    "equal": "`equal`, one keep ratio everywhere",
    "increasing": "`increasing`, which prunes more with depth",
    "greedy": "`greedy`",
    "random, best": "the best of many random profiles",
    "cma-es": "CMA-ES, searching on the same terms",
    "global": "`global` and the other policies that rank the channels of your own network",
    SIBLING: "the smaller network trained from scratch for as long",
}
"""What a sceptic compares a profile with: policy -> words."""


def percent(share: float) -> str:
    """An accuracy with two decimals."""
    return f"{share:.2%}"


def spread(row: Evidence) -> str:
    """Mean and, over more than one seed, standard deviation in points."""
    return f"{row.mean:.2%}" + (f" ± {100 * row.sd:.2f}" if len(row.seeds) > 1 else "")


def shows(found: CataloguedProfile) -> tuple[str, ...]:
    """The certificate's verdict, and a sentence or more for each exam; empty without evidence."""
    certificate = found.profile.certificate
    proven = () if certificate is None else (certificate.verdict,)
    return (*proven, *(line for exam in found.exams for line in _shown(exam, found.origin)))


def _shown(exam: Exam, policy: str) -> list[str]:
    own, base = exam.row(policy), exam.base
    if own is None:
        return []
    dense = f", where the dense network has {percent(base.evidence.mean)}" if base else ""
    before = "" if own.before is None else f", {percent(own.before)} before any training"
    head = f"On {exam.data}, this profile reaches {spread(own.evidence)}{dense}{before}."
    ahead: list[str] = []
    alike: list[str] = []
    behind: list[str] = []
    for row in exam.policies:
        if row is own or row.evidence.standard:
            continue
        gap = own.evidence.mean - row.evidence.mean
        words = f"`{row.evidence.policy}` ({100 * gap:+.2f} points)"
        if abs(gap) <= _by_chance(own.evidence, row.evidence):
            alike.append(words)
        else:
            (ahead if gap > 0 else behind).append(words)
    parts = [
        f"{how} {listed(names)}"
        for how, names in (
            ("ahead of", ahead),
            ("behind", behind),
            ("not told apart from", alike),
        )
        if names
    ]
    sentences = [head, *([f"There it is {'; '.join(parts)}."] if parts else [])]
    if own.dominated_by:
        better = listed([f"`{name}`" for name in own.dominated_by])
        sentences.append(f"There {better} did better with no more parameters and MACs.")
    standard = [
        f"`{row.evidence.policy.removesuffix(STANDARD)}` {spread(row.evidence)}"
        for row in exam.policies
        if row.evidence.standard
    ]
    if standard:
        sentences.append(
            f"After the recipe `standard`, with the dense network as teacher: {listed(standard)}."
        )
    return sentences


def _by_chance(a: Evidence, b: Evidence) -> float:
    """The difference of two means that the t-test does not tell from chance."""
    n, m = len(a.seeds), len(b.seeds)
    freedom = n + m - 2
    if not freedom:
        return math.inf
    variance = ((n - 1) * a.sd**2 + (m - 1) * b.sd**2) / freedom
    return T[min(freedom, len(T)) - 1] * math.sqrt(variance * (1 / n + 1 / m))


def limits(of: CataloguedArchitecture, found: CataloguedProfile | None) -> tuple[str, ...]:
    """What the registry's evidence leaves open, for a profile or for weights alone."""
    if found is None:
        trained = ", ".join(f"{own.epochs} epochs, seed {own.seed}" for own in of.weights)
        return (
            "No profile was searched for this architecture; a policy prunes it.",
            f"The weights come from one training ({trained}): their accuracy has no spread.",
        )
    if not found.exams:
        return (
            "Nothing about its accuracy was measured here: the claims are their authors'.",
            "Its costs are counted here, from the channel counts, at the reference.",
        )
    return (*_measured(found), *_searched(found), *_elsewhere(found))


def _measured(found: CataloguedProfile) -> list[str]:
    exams = found.exams
    seeds = sorted({len(row.evidence.seeds) for exam in exams for row in exam.policies})
    count = " or ".join(map(str, seeds))
    most = max(Counter(exam.data for exam in exams).values())
    networks = "one base network" if most == 1 else f"up to {most} base networks"
    each = "" if len({exam.data for exam in exams}) == 1 else " for each data set"
    sentences = [
        f"It was measured on {networks}{each}, with {count} seeds: the spread is that of channels "
        "and training, not of base networks."
    ]
    if any(not exam.network for exam in exams):
        sentences.append("The checksum of that base network was not recorded.")
    trained = dict.fromkeys(text for exam in exams for text in exam.fidelities)
    sentences.append(f"Training was short: {'; '.join(trained)}. A longer one may rank otherwise.")
    sizes = sorted({size for exam in exams for size in re.findall(r"\bat (\d+x\d+)", exam.data)})
    if sizes:
        sentences.append(f"Images had {listed(sizes)} pixels; no other size was tried.")
    missing = [
        words
        for policy, words in RIVALS.items()
        if not any(exam.row(policy) is not None for exam in exams)
    ]
    if missing:
        sentences.append(f"Not among the rivals: {'; '.join(missing)}.")
    return sentences


def _searched(found: CataloguedProfile) -> list[str]:
    origin = found.profile.provenance
    if origin is None:
        return []
    return [
        f"It was found by one search, of seed {origin.seed}; how much another would differ is not "
        "known from it."
    ]


def _elsewhere(found: CataloguedProfile) -> list[str]:
    at = found.profile.reference
    return [
        f"Its factors hold at {at.num_classes} classes and {at.image_size}x{at.image_size} pixels; "
        "`zoo.load` reports those of your network. Latency was not measured."
    ]


def listed(names: Sequence[str]) -> str:
    """The names in a row, with `and` before the last."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
