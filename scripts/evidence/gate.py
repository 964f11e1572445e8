"""Which fidelity may a search use? Rank random profiles by each, and by a long fine-tune.

    python scripts/evidence/gate.py --arch resnet20-16 --task base.safetensors@cifar10 \
        --data-dir DIR --size 16 --out runs/gate

The cheap accuracies all use one draw of channels, as do all episodes of a search on one task. The
long fine-tune of every profile uses a draw of its own, so that the two share no luck. Every
accuracy is written to `ledger.jsonl` in `--out` at once; a run that is started again continues.
`--masked-epochs 0` leaves out the base network that is trained under random masks.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from zoo.errors import ZooError
from zoo.planning.decisions import Decisions
from zoo.planning.policies import policy_solution
from zoo.planning.rankings import RANKINGS
from zoo.search.evaluation import Evaluator
from zoo.search.fidelities import Distilled, Fidelity, FineTuning, Recalibration
from zoo.search.gate import ENOUGH, Agreement, agreement
from zoo.search.ledger import Ledger
from zoo.search.masked_training import train_under_masks
from zoo.search.tasks import SEARCH_SEEDS, Candidate, Task, load_tasks, say, task_data
from zoo.search.workers import pool_of
from zoo.spec.cost import CostModel, cost_model
from zoo.storage.artefacts import save_checkpoint
from zoo.tracing.known_groups import reference_groups
from zoo.training.recipes import Recipe

LR = 0.05
"""Peak learning rate of every training."""

STD = 0.3
"""Standard deviation of the corrections around a policy."""

DATA = "cifar10"
"""The data set of a base network that names none."""


@dataclass(frozen=True)
class Gate:
    arch: str
    """architecture"""
    task: str
    """CHECKPOINT@DATA of the base network; on CIFAR-10 without DATA"""
    out: Path
    """folder of the ledger"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: int = 32
    """pixels per side"""
    cf: float = 4.0
    """compression factor of every profile"""
    metrics: tuple[str, ...] = ("params", "macs")
    """metrics of that factor"""
    profiles: int = 32
    """profiles per metric"""
    around: str | None = None
    """draw them by random corrections of this policy, as the learned policy explores, instead of
    the policy `random`"""
    images: int = 10_000
    """training images of the fine-tunes"""
    epochs: int = 20
    """of the long fine-tune"""
    masked_epochs: int = 4
    """of training under random masks"""
    workers: int | None = None
    """processes; one per core by default"""


def main(config: Gate) -> None:
    """Measure what is missing and print the table."""
    model = cost_model(reference_groups(config.arch))
    (task,) = load_tasks(config.arch, [config.task], DATA, config.data_dir, config.size)
    profiles = {
        metric: [drawn(task, model, config, metric, seed) for seed in range(config.profiles)]
        for metric in config.metrics
    }
    columns: dict[str, tuple[Task, Fidelity]] = {
        "recalibration, 1,024 + 2,000 images": (task, Recalibration(1024, 2000)),
        "recalibration, 2,048 + all images": (task, Recalibration()),
        **{
            f"recalibration, {steps} steps of distillation": (task, Distilled(steps))
            for steps in (25, 50, 100)
        },
        "fine-tune, 1 epoch of a quarter": (task, FineTuning.of(1, config.images // 4, LR)),
        "fine-tune, 1 epoch": (task, FineTuning.of(1, config.images, LR)),
    }
    if config.masked_epochs:
        twin = masked_twin(task, config)
        columns["recalibration, base trained under masks"] = (twin, Recalibration(1024, 2000))
    long = FineTuning.of(config.epochs, config.images, LR)
    config.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(config.out / "ledger.jsonl")
    pool = pool_of(config.workers)
    evaluator = Evaluator(ledger, pool)
    accuracies: dict[tuple[str, str], list[float]] = {}
    for name, (on, fidelity) in [*columns.items(), ("long", (task, long))]:
        for metric, widths in profiles.items():
            candidates = [
                Candidate(on, w, seed if name == "long" else SEARCH_SEEDS[0])
                for seed, w in enumerate(widths)
            ]
            accuracies[name, metric] = evaluator(candidates, fidelity, "gate")
            say(f"{name}: {len(candidates)} profiles of {config.cf:g}x {metric}")
    pool.close()
    agreements = {
        key: agreement(values, accuracies["long", key[1]])
        for key, values in accuracies.items()
        if key[0] != "long"
    }
    costs = {
        name: seconds(ledger, *pair) for name, pair in {**columns, "long": (task, long)}.items()
    }
    print_table(config, agreements, costs)


def drawn(task: Task, model: CostModel, config: Gate, metric: str, seed: int) -> tuple[int, ...]:
    """The widths of one profile to rank."""
    if config.around is None:
        return policy_solution("random", model, config.cf, metric, seed).widths
    ranking = RANKINGS.get(config.around)
    if ranking is None and config.around != "equal":
        raise ZooError(f"--around takes equal or a ranking ({', '.join(RANKINGS)}).")
    decisions = Decisions(
        task.groups, model, config.cf, metric,
        scores=ranking and task.scores(ranking.criterion),
        ranking=ranking,
    )  # fmt: skip
    rng = random.Random(f"corrections:{seed}")
    while not decisions.finished:
        decisions.decide(rng.gauss(0, STD))
    return decisions.solution().widths


def masked_twin(task: Task, config: Gate) -> Task:
    """The task with its base network trained further under random masks, and stored in a file."""
    path = config.out / f"masked-{task.network[:12]}-{config.masked_epochs}.safetensors"
    if not path.exists():
        module = copy.deepcopy(task.module)
        recipe = Recipe(epochs=config.masked_epochs, lr=LR, precision="fp32")
        torch.set_num_threads(1)
        train_under_masks(module, task.groups, task.train, recipe)
        save_checkpoint(module, path, {"split_digest": task.split_digest})
    data = task_data(config.task, DATA)[1]
    (twin,) = load_tasks(config.arch, [f"{path}"], data, config.data_dir, config.size)
    return dataclasses.replace(twin, name="masked")


def seconds(ledger: Ledger, task: Task, fidelity: Fidelity) -> float:
    """The median seconds of an evaluation."""
    return statistics.median(
        row.seconds
        for row in ledger
        if (row.key.network, row.key.fidelity) == (task.network, fidelity.name)
    )


def print_table(
    config: Gate, agreements: dict[tuple[str, str], Agreement], costs: dict[str, float]
) -> None:
    kind = f"profiles around {config.around}" if config.around else "random profiles"
    print(
        f"Spearman's rank correlation with {config.epochs} epochs of {config.images:,} images, "
        f"{config.profiles} {kind} of {config.cf:g}x, 95 % bootstrap intervals\n"
    )
    heads = "".join(f" {m}, all | {m}, top half |" for m in config.metrics)
    print(f"| fidelity | seconds |{heads}\n|---|---:|" + "---:|---:|" * len(config.metrics))
    for name in [name for name in costs if name != "long"]:
        own = [agreements[name, metric] for metric in config.metrics]
        cells = "".join(
            f" {a.overall:.2f} | {a.top_half:.2f} ({a.interval[0]:.2f} to {a.interval[1]:.2f}) |"
            for a in own
        )
        print(f"| {name} | {costs[name]:.2f} |{cells}")
    print(f"| the long fine-tune | {costs['long']:.2f} |" + " 1 | 1 |" * len(config.metrics))
    for metric in config.metrics:
        print(verdict(metric, [name for name in costs if name != "long"], agreements, costs))


def verdict(
    metric: str,
    names: Sequence[str],
    agreements: dict[tuple[str, str], Agreement],
    costs: dict[str, float],
) -> str:
    """A line that says which fidelity searches of `metric` should use."""
    good = [name for name in names if agreements[name, metric].top_half >= ENOUGH]
    if not good:
        return f"{metric}: no fidelity reaches {ENOUGH} in the top half."
    return f"{metric}: the cheapest with {ENOUGH} in the top half is {min(good, key=costs.get)}."


if __name__ == "__main__":
    main(tyro.cli(Gate, description=__doc__))
