"""Print the evidence of the bundled profiles as Markdown: accuracies, or all of it; or draw it.

python scripts/evidence/evidence_table.py
python scripts/evidence/evidence_table.py --details
python scripts/evidence/evidence_table.py --certificates
python scripts/evidence/evidence_table.py --figure docs/accuracy.svg
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from zoo.common.plots import accuracy_against_size, save
from zoo.publishing.verdicts import spread
from zoo.registry.store import get_profile, list_profiles
from zoo.spec.profile import Evidence, Profile


def table() -> str:
    """One row per profile and base network, one column per policy; accuracies as mean ± sd."""
    measured = [(profile, own) for profile in bundled() for own in by_exam(profile.evidence)]
    policies = dict.fromkeys(row.policy for _, own in measured for row in own)
    heads = ("dense" if policy == "base" else policy for policy in policies)
    lines = [
        f"| profile | data | fine-tune | {' | '.join(heads)} |",
        f"|---|---|---|{'---:|' * len(policies)}",
    ]
    for profile, own in measured:
        rows = {row.policy: row for row in own}
        cells = " | ".join(spread(rows[p]) if p in rows else "" for p in policies)
        lines.append(f"| {_name(profile)} | {_data(own[0])} | {_training(own[1])} | {cells} |")
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
    """Every certificate: its verdict, and a table of its comparisons."""
    parts = []
    for profile in bundled():
        found = profile.certificate
        if found is None:
            continue
        ranks = [
            f"{rank.at_least_as_good} of {rank.profiles} random profiles are as good on "
            f"{rank.data} ({rank.low:.1%} to {rank.high:.1%})"
            for rank in found.ranks
        ]
        lines = [
            f"**{_name(profile)}.** {found.verdict} {'; '.join(ranks)}.\n",
            "| against | points ± sd | base networks | p | Holm |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {each.rival} | {100 * each.difference:+.2f} ± {100 * each.sd:.2f} "
            f"| {each.networks} | {each.p:.2g} | {each.adjusted:.2g} |"
            for each in found.comparisons
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


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
