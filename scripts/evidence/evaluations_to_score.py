"""How many evaluations a search saves by starting from what is known.

    python scripts/evidence/evaluations_to_score.py --arch resnet20-16 --size 16 --data-dir DIR \
        --exams base.safetensors@cifar10 "b.safetensors@imagefolder:DIR/tinyimagenet32-a[50:]" \
        --out runs/evaluations

PPO and CMA-ES search on base networks that no earlier search saw, cold and from a start: after
recalibration, on the validation images and one draw of channels (`--draws`). At every doubling of
the evaluations the best profile so far is scored: its mean accuracy on the test images over
`--fresh` draws that no search uses, recalibrated. What counts is the number of evaluations after
which a search has the score that CMA-ES reaches with all of them from a cold start. What the run's
ledger or one of the registry holds is not measured again, so a run that is started again goes on.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from zoo.data.datasets import load_data
from zoo.errors import ZooError
from zoo.planning.solver import scale_curve, solve
from zoo.registry.store import list_profiles
from zoo.search.agents import SCREENED, agent
from zoo.search.env import EnvSettings, PruningEnv
from zoo.search.evaluation import Evaluator
from zoo.search.evidence import examined
from zoo.search.fidelities import Recalibration
from zoo.search.ledger import Ledger, read
from zoo.search.lookup import ledger_paths
from zoo.search.starts import check_start, start_at
from zoo.search.tasks import Candidate, Task, load_tasks, say, task_data
from zoo.search.vector_env import PruningVectorEnv
from zoo.search.workers import pool_of
from zoo.spec.cost import cost_model

Ratios = tuple[float, ...]
Curve = dict[int, float]
"""Number of evaluations -> score of the best profile so far, in [0, 1]; 0 is the start itself."""

FIRST = 8
"""Evaluations at the first score: one batch."""

COLD = "CMA-ES"
"""The search whose final score is the mark."""


@dataclass(frozen=True)
class Options:
    arch: str
    """architecture"""
    exams: tuple[str, ...]
    """CHECKPOINT@DATA of the base networks"""
    data_dir: Path
    """folder of the data sets' files"""
    out: Path
    """folder of the ledger and of the scores"""
    size: int = 32
    """pixels per side"""
    cf: tuple[float, ...] = (4.0,)
    """factors"""
    metrics: tuple[str, ...] = ("macs", "params")
    """metrics"""
    evaluations: int = 640
    """of every search, at most"""
    stop_at_mark: bool = False
    """end a search with its first score at the mark; in the table the score stands on"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of the agents"""
    draws: int = 1
    """draws of channels per profile in the searches; each counts as an evaluation"""
    screen: int = 1
    """CMA-ES's proposals for each profile that is measured; a surrogate chooses"""
    fresh: int = 8
    """draws of channels of a score"""
    policy: str = ""
    """where PPO starts from; by default learned if this version has it, else global"""
    val_images: int = 2000
    """validation images of the searches' evaluations"""
    workers: int = 1
    """processes that evaluate"""


@dataclass(frozen=True)
class Setting:
    """One base network, metric and factor, and what measures profiles on it."""

    options: Options
    task: Task
    exam: Task
    metric: str
    cf: float
    evaluator: Evaluator

    def searches(self) -> dict[str, tuple[str, Ratios | None]]:
        """Name -> the agent, and the keep ratios that it starts from."""
        policy = self.options.policy or self._known("learned") or "global"
        found: dict[str, tuple[str, Ratios | None]] = {
            COLD: ("cma-es", None),
            f"{COLD} from global": ("cma-es", self._start("global")),
            "PPO": ("ppo", None),
            f"PPO from {policy}": ("ppo", self._start(policy)),
        }
        earlier = [
            entry.reference
            for entry in list_profiles(arch=self.options.arch)
            if (entry.metric, entry.cf) != (self.metric, self.cf)
        ]
        if earlier:
            each = zip(*map(self._start, earlier), strict=True)
            found[f"{COLD} from earlier optima"] = "cma-es", tuple(map(statistics.fmean, each))
        return found

    def curve(self, name: str, start: Ratios | None, seed: int, mark: float = math.inf) -> Curve:
        """Search, and score the best profile at every doubling, up to the first score at `mark`."""
        options = self.options
        starts = None if start is None else {self.cf: start}
        settings = EnvSettings(metric=self.metric, draws=options.draws)  # type: ignore[arg-type]
        cost = cost_model(self.task.groups)
        env = PruningVectorEnv(
            lambda: PruningEnv(
                (self.task,), self.task.groups, self.cf, self._measure, settings,
                cost=cost, start=starts,
            ),
            FIRST,
        )  # fmt: skip
        played: list[tuple[float, tuple[int, ...]]] = []
        scores: Curve = {}

        def on_episode(episode: Mapping[str, Any]) -> None:
            played.append((episode["reward"], episode["widths"]))
            for count in doublings(options.evaluations):
                if len(played) == max(1, count // options.draws):
                    scores[count] = self._score(max(played)[1])

        if start is not None:
            scores[0] = self._score(solve(cost, scale_curve(start), self.cf, self.metric).widths)
        if not reached(mark, scores):
            own = {"screen": options.screen} if name in SCREENED else {}
            agent(name)(
                env, options.evaluations // options.draws, seed=seed,
                on_episode=on_episode, stop=lambda: reached(mark, scores), **own,
            )  # fmt: skip
        return scores

    def _measure(self, candidates: Sequence[Candidate]) -> list[float]:
        return self.evaluator(candidates, Recalibration(1024, self.options.val_images), "search")

    def _score(self, widths: tuple[int, ...]) -> float:
        """Mean accuracy on the test images, over draws of channels that no search uses."""
        drawn = [Candidate(self.exam, widths, seed) for seed in range(self.options.fresh)]
        return statistics.fmean(self.evaluator(drawn, Recalibration(), "score"))

    def _start(self, reference: str) -> Ratios:
        cost, own = cost_model(self.task.groups), self.options
        return start_at(reference, own.arch, [self.task], cost, self.cf, self.metric).ratios

    def _known(self, policy: str) -> str | None:
        with suppress(ZooError):
            own = self.options.arch, self.task.groups, self.cf, self.metric
            return check_start(policy, *own)[0]
        return None


def doublings(evaluations: int) -> list[int]:
    """8, 16, 32, ... and the number of evaluations itself."""
    count = math.ceil(math.log2(max(1, evaluations / FIRST)))
    return [*(FIRST * 2**n for n in range(count)), evaluations]


def main(options: Options) -> None:
    """Search and score what is missing; a table for each base network, metric and factor."""
    options.out.mkdir(parents=True, exist_ok=True)
    scores = options.out / "scores.jsonl"
    scores.unlink(missing_ok=True)
    pool = pool_of(options.workers)
    with Ledger(options.out / "ledger.jsonl", known=read(ledger_paths())) as ledger:
        for reference in options.exams:
            load = options.arch, [reference], "cifar10", options.data_dir, options.size
            (task,) = load_tasks(*load)
            name = task_data(reference, "cifar10")[1]
            exam = examined(task, load_data(name, options.data_dir, size=options.size).test)
            for metric in options.metrics:
                for cf in options.cf:
                    setting = Setting(options, task, exam, metric, cf, Evaluator(ledger, pool))
                    curves = measured(setting)
                    what = f"{options.arch}, {cf:g}x {metric}, {exam.val.name}, test split"
                    print(f"\n**{what}; dense {exam.base_accuracy:.2%}**\n")
                    print(table(curves), flush=True)
                    with scores.open("a") as stream:
                        told = {"network": task.network, "metric": metric, "cf": cf}
                        stream.write(json.dumps({**told, "curves": curves}) + "\n")
    pool.close()


def measured(setting: Setting) -> dict[str, list[Curve]]:
    """Search -> one curve per seed."""
    curves: dict[str, list[Curve]] = {}
    for name, (kind, start) in setting.searches().items():
        mark = final(curves[COLD]) if setting.options.stop_at_mark and curves else math.inf
        curves[name] = []
        for seed in setting.options.seeds:
            curves[name].append(setting.curve(kind, start, seed, mark))
            scores = " ".join(f"{count}: {s:.1%}" for count, s in curves[name][-1].items())
            say(f"{setting.cf:g}x {setting.metric}, {name}, seed {seed}: {scores}")
    return curves


def final(curves: Sequence[Curve]) -> float:
    """Mean score after all evaluations."""
    return statistics.fmean(curve[max(curve)] for curve in curves)


def reached(mark: float, curve: Curve) -> bool:
    return evaluations_to(mark, curve) < math.inf


def table(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Mean scores by evaluations, and the evaluations to the mark: the median over the seeds."""
    mark = final(curves[COLD])
    counts = sorted({count for own in curves.values() for curve in own for count in curve})
    heads = ["start" if count == 0 else f"{count}" for count in counts]
    lines = [
        f"| search | {' | '.join(heads)} | evaluations to {mark:.2%} | seeds that reach it |",
        f"|---|{'---:|' * (len(counts) + 2)}",
    ]
    for name, own in curves.items():
        cells = [cell([at(n, curve) for curve in own if min(curve) <= n]) for n in counts]
        needed = [evaluations_to(mark, curve) for curve in own]
        reach = f"{sum(reached(mark, curve) for curve in own)} of {len(own)}"
        lines.append(f"| {' | '.join([name, *cells, told(needed, max(counts)), reach])} |")
    return "\n".join(lines)


def at(count: int, curve: Curve) -> float:
    """The score after `count` evaluations; that of a search which ended before them stands on."""
    return curve[max(n for n in curve if n <= count)]


def cell(scores: Sequence[float]) -> str:
    if not scores:
        return ""
    spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{100 * statistics.fmean(scores):.1f}{spread}"


def evaluations_to(mark: float, curve: Curve) -> float:
    """The first number of evaluations with the score `mark`; infinite if it never has it."""
    return min((count for count, score in curve.items() if score >= mark), default=math.inf)


def told(needed: Sequence[float], most: int) -> str:
    """The median, and the range where the seeds differ."""

    def word(count: float) -> str:
        return f"over {most}" if math.isinf(count) else f"{count:g}"

    low, middle, high = min(needed), statistics.median_high(needed), max(needed)
    return word(middle) + (f" ({word(low)} to {word(high)})" if low < high else "")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
