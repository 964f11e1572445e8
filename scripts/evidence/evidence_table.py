"""Print the evidence of the bundled profiles as Markdown: accuracies, or all of it; or draw it.

python scripts/evidence/evidence_table.py
python scripts/evidence/evidence_table.py --details
python scripts/evidence/evidence_table.py --certificates
python scripts/evidence/evidence_table.py --figure docs/accuracy.svg
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from zoo.common.plots import accuracy_against_size, save
from zoo.publishing.verdicts import spread
from zoo.registry.store import get_profile, list_profiles
from zoo.spec.certificate import Comparison
from zoo.spec.profile import SIBLING, Evidence, Profile

COLUMNS = (
    "base", SIBLING, "equal", "increasing", "greedy", "random, best", "global", "global-bn",
    "global-lamp", "global-fisher-per-cost", "knapsack", "learned", "searched", "cma-es",
)  # fmt: skip
"""Policies from left to right; any other stands after them."""


def table() -> str:
    """A row per profile and data set, a column per policy: mean ± sd over networks and seeds."""
    measured = [
        (profile, list(exams))
        for profile in bundled()
        for _, exams in groupby(by_exam(profile.evidence), lambda own: own[0].data)
    ]
    policies = _sorted({r.policy for _, exams in measured for own in exams for r in own})
    heads = ("dense" if policy == "base" else policy for policy in policies)
    lines = [
        f"| profile | data | fine-tune | networks x seeds | {' | '.join(heads)} |",
        f"|---|---|---|---|{'---:|' * len(policies)}",
    ]
    for profile, exams in measured:
        pooled: dict[str, list[float]] = defaultdict(list)
        for row in chain.from_iterable(exams):
            pooled[row.policy] += row.accuracies
        own = exams[0][1]
        cells = " | ".join(_pooled(pooled[policy]) for policy in policies)
        lines.append(
            f"| {_name(profile)} | {_data(own)} | {_training(own)} | "
            f"{len(exams)} x {len(own.seeds)} | {cells} |"
        )
    return "\n".join(lines)


def details() -> str:
    """A table for each profile and base network: costs, accuracies before and after training."""
    parts = []
    for profile in bundled():
        for own in by_exam(profile.evidence):
            usual = own[1].fidelity
            title = f"{_name(profile)}, {own[0].data}, {usual}"
            lines = [
                f"**{title}**\n",
                "| policy | parameters | MACs | without training | fine-tuned | seeds |",
                "|---|---:|---:|---:|---:|---:|",
            ]
            for row in own:
                before = f"{sum(row.before) / len(row.before):.2%}" if row.before else ""
                costs = f"{row.params:,} | {row.macs:,}"
                same = row.policy == "base" or row.fidelity == usual
                named = row.policy if same else f"{row.policy} ({row.fidelity})"
                lines.append(f"| {named} | {costs} | {before} | {spread(row)} | {len(row.seeds)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def certificates() -> str:
    """One row per certificate: its ranks, and its mean lead over every rival with Holm's p."""
    found = [(each, each.certificate) for each in bundled() if each.certificate]
    rivals = _sorted({each.rival for _, own in found for each in own.comparisons})
    lines = [
        f"| profile | verdict | networks | random as good | {' | '.join(rivals)} |",
        f"|---|---|---:|---:|{'---:|' * len(rivals)}",
    ]
    for profile, own in found:
        leads = {each.rival: each for each in own.comparisons}
        cells = " | ".join(_lead(leads[rival]) if rival in leads else "" for rival in rivals)
        ranks = "; ".join(f"{rank.at_least_as_good} of {rank.profiles}" for rank in own.ranks)
        verdict = own.verdict.partition(":")[0].lower()
        networks = own.comparisons[0].networks
        lines.append(f"| {_name(profile)} | {verdict} | {networks} | {ranks} | {cells} |")
    return "\n".join(lines)


def figure() -> Figure:
    """Accuracy against parameters of resnet20-16 on CIFAR-10, one line for each policy."""
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in list_profiles(arch="resnet20-16", metric="params"):
        for row in by_exam(get_profile(entry.reference).evidence)[0]:
            series[row.policy].append((row.params, row.mean))
    dense = series["base"][0][1]
    lines = {name: series[name] for name in ("searched", "greedy", "equal")}
    return accuracy_against_size("resnet20-16 on CIFAR-10 at 16x16", lines, dense)


def bundled() -> Iterator[Profile]:
    return (get_profile(entry.reference) for entry in list_profiles())


def by_exam(rows: Iterable[Evidence]) -> list[list[Evidence]]:
    """The rows of each base network and its data, `base` first."""
    parts: dict[tuple[str, str], list[Evidence]] = {}
    for row in rows:
        parts.setdefault(row.exam, []).append(row)
    return list(parts.values())


def _sorted(policies: Iterable[str]) -> list[str]:
    places = {name: place for place, name in enumerate(COLUMNS)}
    return sorted(policies, key=lambda name: (places.get(name, len(COLUMNS)), name))


def _pooled(accuracies: Sequence[float]) -> str:
    """Mean in percent and, over more than one, standard deviation."""
    if not accuracies:
        return ""
    mean = f"{100 * statistics.fmean(accuracies):.1f}"
    return mean + (f" ± {100 * statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else "")


def _lead(own: Comparison) -> str:
    """Mean in points and its adjusted p."""
    return f"{100 * own.difference:+.1f} ({own.adjusted:.2g})"


def _name(profile: Profile) -> str:
    return f"{profile.architecture} {profile.cf:g}x {profile.metric}"


def _data(row: Evidence) -> str:
    """The data set and its classes, without the encoding, the size and the split."""
    name, _, rest = row.data.removesuffix(", test split").partition(" at ")
    classes = rest.partition(", ")[2]
    return name.partition(" (")[0] + (f", {classes}" if classes else "")


def _training(row: Evidence) -> str:
    """`<epochs> x <images>` of the fidelity that `zoo.search.evidence` states."""
    found = re.match(r"fine-tuned (\d+) epochs of (\d+) images", row.fidelity)
    return f"{found[1]} x {int(found[2]):,}" if found else row.fidelity


@dataclass(frozen=True)
class Options:
    details: bool = False
    """print every number of the evidence, in a table for each profile and base network"""
    certificates: bool = False
    """print the certificates instead"""
    figure: Path | None = None
    """draw the README's figure into this file instead"""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    if options.figure:
        save(figure(), options.figure)
    elif options.certificates:
        print(certificates())
    else:
        print(details() if options.details else table())
