"""Print the evidence of the bundled profiles as Markdown: fine-tuned accuracies, or all of it.

python scripts/evidence/evidence_table.py
python scripts/evidence/evidence_table.py --details
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import tyro

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
        cells = " | ".join(_accuracy(rows[p]) if p in rows else "" for p in policies)
        lines.append(f"| {_name(profile)} | {_data(own[0])} | {_training(own[-1])} | {cells} |")
    return "\n".join(lines)


def details() -> str:
    """A table for each profile and base network: costs, accuracies before and after training."""
    parts = []
    for profile in bundled():
        for own in by_exam(profile.evidence):
            title = f"{_name(profile)}, {own[0].data}, {own[-1].fidelity}"
            lines = [
                f"**{title}**\n",
                "| policy | parameters | MACs | without training | fine-tuned | seeds |",
                "|---|---:|---:|---:|---:|---:|",
            ]
            for row in own:
                before = f"{sum(row.before) / len(row.before):.2%}" if row.before else ""
                costs = f"{row.params:,} | {row.macs:,}"
                lines.append(
                    f"| {row.policy} | {costs} | {before} | {_accuracy(row)} | {len(row.seeds)} |"
                )
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


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


def _accuracy(row: Evidence) -> str:
    return f"{row.mean:.2%} ± {100 * row.sd:.2f}" if row.before else f"{row.mean:.2%}"


@dataclass(frozen=True)
class Options:
    details: bool = False
    """every number of the evidence, a table for each profile and base network"""


if __name__ == "__main__":
    print(details() if tyro.cli(Options, description=__doc__).details else table())
