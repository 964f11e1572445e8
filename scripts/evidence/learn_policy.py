"""Train the policy that serves every network, by PPO over several networks at once.

    python scripts/evidence/learn_policy.py --data-dir DIR --size 16 --out runs/learned \
        --tasks "resnet20-16=a.safetensors@cifar10" "cnet=b.safetensors@cifar10"

Writes `policy.json` and `policy.safetensors`, and `episodes.jsonl` as the episodes are played. What
its ledger holds is not measured again, so a run that is started again goes on.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes

from zoo.common.documents import encode
from zoo.search.evaluation import Evaluator
from zoo.search.fidelities import Distilled, Fidelity, Recalibration
from zoo.search.ledger import FILE, Ledger, read
from zoo.search.provenance import shortened
from zoo.search.tasks import Task, load_tasks, say
from zoo.search.transfer import Played, TransferSettings, cases, learn


@dataclasses.dataclass(frozen=True)
class Options:
    tasks: tuple[str, ...]
    """ARCH=CHECKPOINT@DATA of the base networks"""
    data_dir: Path
    """folder of the data sets' files"""
    out: Path
    """folder of the ledger, the episodes and the policy"""
    known: tuple[Path, ...] = ()
    """ledgers of other runs, whose evaluations are not repeated"""
    size: int = 32
    """pixels per side"""
    calibration_images: int = 1024
    """training images for the recalibration, without distillation"""
    val_images: int = 2000
    """validation images of every episode, without distillation"""
    distill_steps: int = 100
    """steps of distillation after the recalibration; 0 for none: by MACs a recalibration alone does
    not rank profiles near a good one (docs/evidence.md)"""
    settings: Annotated[TransferSettings, OmitArgPrefixes] = dataclasses.field(
        default_factory=TransferSettings
    )


def main(options: Options) -> None:
    """Train, and print the mean rewards of every base network's first and last episodes."""
    options.out.mkdir(parents=True, exist_ok=True)
    tasks = [pair for text in options.tasks for pair in _tasks(text, options)]
    known = cases(tasks, options.settings)
    say(f"{len(known)} cases of {len(tasks)} base networks")
    fidelity: Fidelity = Recalibration(options.calibration_images, options.val_images)
    if options.distill_steps:
        fidelity = Distilled(options.distill_steps)
    played: list[Played] = []
    log = options.out / "episodes.jsonl"
    log.unlink(missing_ok=True)

    def on_episode(episode: Played) -> None:
        played.append(episode)
        with log.open("a") as stream:
            stream.write(json.dumps(_told(episode)) + "\n")
        if len(played) % 100 == 0:
            recent = statistics.mean(each.reward for each in played[-100:])
            say(f"{len(played)} episodes, mean reward of the last 100: {recent:+.4f}")

    with Ledger(options.out / FILE, known=read(options.known)) as ledger:
        evaluator = Evaluator(ledger)
        policy = learn(
            known,
            lambda candidates: evaluator(candidates, fidelity, "learned"),
            options.settings,
            fidelity=fidelity.name,
            command=shlex.join(["python", *map(shortened, sys.argv)]),
            on_episode=on_episode,
        )
    policy.write(options.out)
    _report(played)


def _tasks(text: str, options: Options) -> list[tuple[str, Task]]:
    arch, _, reference = text.partition("=")
    (task,) = load_tasks(arch, [reference], "cifar10", options.data_dir, options.size)
    return [(arch, task)]


def _told(episode: Played) -> dict[str, object]:
    case = episode.case
    return {
        "arch": case.arch,
        "data": case.task.val.name,
        "metric": case.metric,
        "cf": case.cf,
        "scores": case.scores is not None,
        "seed": case.seed,
        **{key: value for key, value in encode(episode).items() if key != "case"},
    }


def _report(played: list[Played]) -> None:
    print("| network | data | metric | scores | episodes | reward, first fifth | last fifth |")
    print("|---|---|---|---|---:|---:|---:|")
    by: dict[tuple[str, str, str, bool], list[float]] = defaultdict(list)
    for each in played:
        case = each.case
        key = case.arch, case.task.val.name, case.metric, case.scores is not None
        by[key].append(each.reward)
    for (arch, data, metric, scores), rewards in sorted(by.items()):
        fifth = max(1, len(rewards) // 5)
        first, last = statistics.mean(rewards[:fifth]), statistics.mean(rewards[-fifth:])
        told = f"| {arch} | {data} | {metric} | {'yes' if scores else 'no'} | {len(rewards)} |"
        print(f"{told} {first:+.4f} | {last:+.4f} |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
