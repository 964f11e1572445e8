"""The learned policy where it was not trained: one architecture is left out in turn.

    python scripts/evidence/leave_one_out.py --data-dir DIR --size 16 --out runs/leave-one-out \
        --tasks "resnet20-16=a.safetensors@cifar10" "cnet=b.safetensors@cifar10" ...

Each turn trains the policy on the other architectures' base networks and measures it on those of
the one left out, beside its rivals, after the same fine-tune. What this run, its other turns or the
registry's ledgers have measured is not measured again; `--turns` names the architectures to leave
out.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import learn_policy
import policies
import tyro
from tyro.conf import OmitArgPrefixes

from zoo.common.documents import decode
from zoo.search.ledger import FILE
from zoo.search.lookup import ledger_paths
from zoo.search.provenance import shortened
from zoo.search.tasks import say
from zoo.search.transfer import TransferSettings
from zoo.spec.profile import Evidence

RIVALS = (
    "equal", "increasing", "residual-dense", "global", "global-fisher-per-cost", "knapsack",
    "global-bn", "global-lamp",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    tasks: tuple[str, ...]
    """ARCH=CHECKPOINT@DATA of all base networks"""
    data_dir: Path
    """folder of the data sets' files"""
    out: Path
    """folder of the policies, ledgers and rows"""
    size: int = 32
    """pixels per side"""
    turns: tuple[str, ...] = ()
    """architectures to leave out; by default each in turn"""
    cf: tuple[float, ...] = (2.0, 3.0, 4.0)
    """factors to measure at"""
    finetune_epochs: int = 3
    """of every fine-tune"""
    images: int = 10_000
    """training images of every fine-tune"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the channels kept and of the training"""
    distill_steps: int = 100
    """of every episode of the training, as in learn_policy.py"""
    settings: Annotated[TransferSettings, OmitArgPrefixes] = field(default_factory=TransferSettings)


def main(options: Options) -> None:
    """Every turn, then the table of all of them."""
    names = [text.partition("=")[0] for text in options.tasks]
    rows: list[tuple[str, str, float, list[Evidence]]] = []
    for arch in options.turns or tuple(dict.fromkeys(names)):
        if arch not in names or len(set(names)) < 2:
            raise SystemExit(f"{arch} cannot be left out of {', '.join(names)}.")
        out = options.out / arch
        if not (out / "policy.json").exists():
            say(f"{arch} is left out: training on {', '.join(sorted(set(names) - {arch}))}")
            learn_policy.main(_training(arch, out, options))
        policies.main(_exam(arch, out, options))
        rows += _read(out / policies.ROWS)
    print(table(rows))


def _training(arch: str, out: Path, options: Options) -> learn_policy.Options:
    others = tuple(text for text in options.tasks if text.partition("=")[0] != arch)
    turns = (path for path in options.out.glob(f"*/{FILE}") if path.parent != out)
    known = (*ledger_paths(), *turns)
    return learn_policy.Options(
        tasks=others, known=known, data_dir=options.data_dir, out=out, size=options.size,
        distill_steps=options.distill_steps, settings=options.settings,
    )  # fmt: skip


def _exam(arch: str, out: Path, options: Options) -> policies.Options:
    own = tuple(text.partition("=")[2] for text in options.tasks if text.startswith(f"{arch}="))
    return policies.Options(
        arch=arch, exams=own, data_dir=options.data_dir, out=out, size=options.size,
        cf=options.cf, epochs=options.finetune_epochs, images=options.images, seeds=options.seeds,
        policies=RIVALS, learned=out,
    )  # fmt: skip


def _read(path: Path) -> list[tuple[str, str, float, list[Evidence]]]:
    found = []
    for line in path.read_text().splitlines():
        told = json.loads(line)
        rows = [decode(Evidence, row, str(path)) for row in told["rows"]]
        found.append((told["arch"], told["metric"], told["cf"], rows))
    return found


def table(rows: list[tuple[str, str, float, list[Evidence]]]) -> str:
    """A line for each architecture, metric and factor: every policy's accuracy, mean and sd.

    Over several base networks of an architecture both are means.
    """
    columns = list(dict.fromkeys(row.policy for *_, own in rows for row in own))
    merged: dict[tuple[str, str, float], dict[str, list[Evidence]]] = defaultdict(dict)
    for arch, metric, cf, own in rows:
        for row in own:
            merged[arch, metric, cf].setdefault(row.policy, []).append(row)
    lines = [
        f"<!-- {shlex.join(['python', *map(shortened, sys.argv)])} -->",
        f"| left out | factor | {' | '.join(columns)} |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for (arch, metric, cf), found in merged.items():
        means = {name: statistics.mean(row.mean for row in own) for name, own in found.items()}
        best = max(mean for name, mean in means.items() if name != "base")
        cells = []
        for name in columns:
            told = f"{100 * means[name]:.1f}" if name in means else ""
            if name in means and name != "base":
                told += f" ± {100 * statistics.mean(row.sd for row in found[name]):.1f}"
            cells.append(f"**{told}**" if means.get(name) == best else told)
        lines.append(f"| {arch} | {cf:g}x {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
