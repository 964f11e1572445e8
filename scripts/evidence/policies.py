"""Which policy is best where nothing was searched: all of them, fine-tuned alike, on test images.

    python scripts/evidence/policies.py --arch resnet20-16 --size 16 --data-dir DIR \
        --exams base.safetensors@cifar10 "b.safetensors@imagefolder:DIR/tinyimagenet32-a[50:]" \
        --out runs/policies

Policies that need data see the training images of the base network. What the run's ledger or one of
the registry holds is not measured again, so a run that is started again goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.common.documents import encode
from zoo.data.datasets import load_data
from zoo.errors import FactorError
from zoo.planning.learned import LearnedPolicy
from zoo.planning.policies import POLICIES
from zoo.planning.rankings import RANKINGS
from zoo.publishing.catalogue import dominates
from zoo.publishing.verdicts import spread
from zoo.registry.store import find_profile
from zoo.search.evaluation import Evaluator
from zoo.search.evidence import evidence, examined, learned_widths, policy_widths
from zoo.search.fidelities import FineTuning, FromScratch
from zoo.search.ledger import Ledger, read
from zoo.search.lookup import ledger_paths
from zoo.search.tasks import Task, load_tasks, say, task_data
from zoo.spec.cost import CostModel, cost_model
from zoo.spec.profile import STANDARD, Evidence

Widths = tuple[int, ...]

ROWS = "rows.jsonl"
"""The file of the tables' rows in the output folder: the latest of each base network, metric and
factor. A run leaves the others alone."""


@dataclass(frozen=True)
class Options:
    arch: str
    """architecture"""
    exams: tuple[str, ...]
    """CHECKPOINT@DATA of the base networks"""
    data_dir: Path
    """folder of the data sets' files"""
    out: Path
    """folder of the ledger and of the rows"""
    size: int = 32
    """pixels per side"""
    cf: tuple[float, ...] = (4.0,)
    """factors"""
    metrics: tuple[str, ...] = ("macs", "params")
    """metrics"""
    epochs: int = 5
    """of every fine-tune"""
    images: int = 10_000
    """training images of every fine-tune"""
    lr: float = 0.05
    """its peak learning rate"""
    seeds: tuple[int, ...] = (0, 1)
    """of the channels kept and of the training"""
    policies: tuple[str, ...] = (*POLICIES, *RANKINGS)
    """policies to measure, beside the searched profile"""
    learned: Path | None = None
    """folder of a learned policy, measured with the training images and without"""
    sibling_epochs: int = 0
    """epochs of all training images for the sibling, which starts from scratch; 0 for none"""
    base_lr: float = 0.1
    """peak learning rate of the base networks, and so of the sibling and of `standard`"""
    standard: tuple[str, ...] = ()
    """policies to measure after the recipe `standard` too, by the first seed"""


def main(options: Options) -> None:
    """Measure what is missing; a table for each base network, metric and factor."""
    options.out.mkdir(parents=True, exist_ok=True)
    fidelity = FineTuning.of(options.epochs, options.images, options.lr)
    standard = FineTuning.standard(options.base_lr)
    sibling = None
    if options.sibling_epochs:
        sibling = FromScratch.of(options.sibling_epochs, None, options.base_lr)
    learned = None if options.learned is None else LearnedPolicy.read(options.learned)
    rows = options.out / ROWS
    done = {_which(line): line for line in rows.read_text().splitlines()} if rows.exists() else {}
    with Ledger(options.out / "evidence.jsonl", known=read(ledger_paths())) as ledger:
        evaluator = Evaluator(ledger)
        for reference in options.exams:
            (task,) = load_tasks(
                options.arch, [reference], "cifar10", options.data_dir, options.size
            )
            name = task_data(reference, "cifar10")[1]
            test = load_data(name, options.data_dir, size=options.size).test
            exam, cost = examined(task, test), cost_model(task.groups)
            for metric in options.metrics:
                for cf in options.cf:
                    policies = searched(options.arch, exam, metric, cf)
                    policies |= policy_widths(options.policies, exam, cost, cf, metric)
                    if learned is not None:
                        policies |= by_learned(learned, exam, cost, cf, metric)
                    found = evidence(
                        policies, exam, evaluator, fidelity, options.seeds, cost, sibling=sibling
                    )
                    own = {f"{n}{STANDARD}": policies[n] for n in options.standard if n in policies}
                    _, *longer = evidence(own, exam, evaluator, standard, options.seeds[:1], cost)
                    found = (*found, *longer)
                    print(f"\n**{options.arch}, {cf:g}x {metric}, {found[0].data}**\n")
                    print(table(found, cost), flush=True)
                    told = {"metric": metric, "cf": cf, "rows": [encode(row) for row in found]}
                    line = json.dumps({"arch": options.arch, **told})
                    done[_which(line)] = line
                    rows.write_text("".join(f"{each}\n" for each in done.values()))


def _which(line: str) -> tuple[str, float, str]:
    """The metric, factor and base network that a line of `ROWS` is about."""
    told = json.loads(line)
    return told["metric"], told["cf"], told["rows"][0]["network"]


def by_learned(
    policy: LearnedPolicy, task: Task, cost: CostModel, cf: float, metric: str
) -> dict[str, Widths]:
    """The learned policy's widths, with the training images and without any."""
    found = {}
    for name, data in (("learned", True), ("learned, no data", False)):
        try:
            found[name] = learned_widths(policy, task, cost, cf, metric, data=data)
        except FactorError as error:
            say(f"{name}: {error}")
    return found


def searched(arch: str, task: Task, metric: str, cf: float) -> dict[str, Widths]:
    """The bundled profile, where there is one."""
    try:
        profile = find_profile(arch, cf, metric)[1]
    except FactorError as error:
        say(str(error))
        return {}
    return {"searched": tuple(profile.kept[name] for name in task.groups.names)}


def table(rows: tuple[Evidence, ...], cost: CostModel) -> str:
    """Best first. A row is dominated when another is no worse in accuracy, params and MACs.

    What was trained by the recipe `standard` dominates none.
    """
    dense, *policies = rows
    alike = [row for row in policies if not row.standard]
    lines = [
        "| policy | accuracy | params | MACs | dominated by |",
        "|---|---:|---:|---:|---|",
        f"| dense | {dense.mean:.2%} | 1x | 1x | |",
    ]
    for row in sorted(policies, key=lambda row: -row.mean):
        better = [other.policy for other in alike if dominates(other, row)]
        factors = f"{cost.dense.params / row.params:.2f}x | {cost.dense.macs / row.macs:.2f}x"
        lines.append(
            f"| {row.policy} | {spread(row)} | {factors} "
            f"| {', '.join(better[:2])}{', ...' if len(better) > 2 else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
