"""Search profiles, compare each with rivals on networks and data that no search saw; bundle them.

    python scripts/evidence/examine.py --search.arch resnet20-16 --search.cf 4 --search.size 16 \
        --search.tasks s0.safetensors@cifar10 --search.data-dir DIR --search.out runs/params \
        --exams s2.safetensors@cifar10 "b.safetensors@imagefolder:DIR[50:]" --bundle

Started again, it continues: what its ledgers hold is not measured again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.registry.store import folder_name, write_index
from zoo.search.certificate import Certificate
from zoo.search.examination import Examination, examine
from zoo.spec.cost import CostModel, cost_model
from zoo.spec.profile import Profile
from zoo.tracing.known_groups import reference_groups

REGISTRY = Path(__file__).resolve().parents[2] / "registry"


@dataclass(frozen=True, kw_only=True)
class Options(Examination):
    bundle: bool = False
    """put the profiles into the registry"""


def main(options: Options) -> None:
    """Print what is found of every profile as it comes, and bundle it."""
    cost = cost_model(reference_groups(options.search.arch))
    for found in examine(options):
        print_evidence(found.profile, cost)
        print_certificate(options, found.certificate)
        if options.bundle:
            profile = found.profile
            profile.write(REGISTRY / folder_name(profile.architecture) / f"{profile.name}.json")
            write_index(REGISTRY)


def print_evidence(profile: Profile, cost: CostModel) -> None:
    print(f"\n{profile.architecture} {profile.cf:g}x {profile.metric}")
    for row in profile.evidence:
        print(
            f"{row.policy:<14}{cost.dense.params / row.params:6.2f}x params "
            f"{cost.dense.macs / row.macs:6.2f}x MACs  {row.mean:.2%} ± {row.sd:.2%}  {row.data}"
        )


def print_certificate(options: Options, certificate: Certificate) -> None:
    rank = certificate.rank
    print(
        f"{rank.at_least_as_good} of {rank.profiles} random profiles are as good on the first exam "
        f"after {options.short_epochs} epoch: {rank.probability:.1%} (95 % interval "
        f"{rank.low:.1%} to {rank.high:.1%})"
    )
    for rival in certificate.comparisons:
        print(
            f"against {rival.rival:<14}{rival.difference:+.2%} ± {rival.sd:.2%} over {rival.pairs} "
            f"pairs of {len(options.exams)} base networks, p {rival.p:.2g}, Holm "
            f"{rival.adjusted:.2g}"
        )
    print("passes" if certificate.passes else "does not pass")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
