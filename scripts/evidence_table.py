"""Print the evidence of every bundled profile as one Markdown table.

python scripts/evidence_table.py
"""

from __future__ import annotations

from zoo.profile import Evidence
from zoo.registry import get_profile, list_profiles


def table() -> str:
    """One row per policy of each profile: costs, and accuracies as mean ± sd over seeds."""
    lines = [
        "| profile | policy | parameters | MACs | without training | fine-tuned |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for entry in list_profiles():
        profile = get_profile(entry.reference)
        name = f"{profile.architecture} {profile.cf:g}x {profile.metric}"
        for row in profile.evidence:
            lines.append(
                f"| {name} | {row.policy} | {row.params:,} | {row.macs:,} | {_cells(row)} |"
            )
    return "\n".join(lines)


def _cells(row: Evidence) -> str:
    if not row.before:
        return f" | {row.mean:.2%} (dense)"
    return f"{sum(row.before) / len(row.before):.2%} | {row.mean:.2%} ± {100 * row.sd:.2f}"


if __name__ == "__main__":
    print(table())
