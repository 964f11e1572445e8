"""The main job, end to end: train a base network, prune it 4x, fine-tune, save, export, compare."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import rich.console
import rich.table
import torch
import tyro

import zoo
from zoo.common.documents import write_json
from zoo.data.datasets import Splits
from zoo.spec.plans import PruningRecord
from zoo.storage.artefacts import save_checkpoint

ARCH, CF = "resnet20-16", 4
BATCH_SIZES = (1, 8, 64)


@dataclass(frozen=True)
class Quickstart:
    """Train ResNet-20-16, prune it 4x by a bundled profile, and compare the two."""

    data: Literal["digits", "cifar10"] = "digits"
    """digits needs no download; cifar10 needs --data-dir with train/ and val/ image folders"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: int = 32
    """pixels per side that the images are resized to"""
    out: Path = Path("quickstart-output")
    """folder for everything that is written"""
    profile: str = "searched"
    """searched, or a policy's name to compare with"""
    seed: int = 0
    """of weights, channels, shuffling and augmentation"""


RECIPES = {
    "digits": (zoo.Recipe(epochs=8, batch_size=64), zoo.Recipe(epochs=8, batch_size=64)),
    "cifar10": (zoo.Recipe(epochs=10), zoo.Recipe(epochs=5)),
}
"""Data set -> how the base network is trained, and how the pruned one is fine-tuned."""


def main(config: Quickstart) -> None:
    """Run every stage, print the table, and write it as `quickstart.json` beside the artefacts."""
    seconds: dict[str, float] = {}
    train_recipe, tune_recipe = RECIPES[config.data]
    base_path = config.out / "base.safetensors"
    folder = config.out / f"{ARCH}-cf{CF}"

    splits = zoo.load_data(config.data, config.data_dir, size=config.size)
    counts = [len(part) for part in (splits.train, splits.val, splits.test)]
    print(
        f"Data: {splits.train.name}; {counts[0]:,} training, {counts[1]:,} validation and ", end=""
    )
    print(f"{counts[2]:,} test images. Every accuracy below is on the test images.")

    with stage("train the base network", seconds):
        base = zoo.create_model(ARCH, splits.num_classes, image_size=config.size, seed=config.seed)
        train(base, splits, train_recipe, config.seed)
        metadata = {"architecture": ARCH, "image_size": str(config.size)}
        save_checkpoint(base, base_path, metadata)
    with stage("load it pruned", seconds):
        model = zoo.load(ARCH, CF, base_path, profile=config.profile, seed=config.seed)
    with stage("evaluate both", seconds):
        base_accuracy = zoo.evaluate(base, splits.test).accuracy
        before = zoo.evaluate(model, splits.test).accuracy
    with stage("fine-tune", seconds):
        train(model, splits, tune_recipe, config.seed)
        after = zoo.evaluate(model, splits.test).accuracy
    images = splits.test.normalise(splits.test.images[: max(BATCH_SIZES)])
    with stage("save and reload", seconds):
        zoo.save(model, folder)
        check_identical(model, zoo.load_pruned(folder), images)
    with stage("export to ONNX and check", seconds):
        exports = [
            zoo.export(module, config.out / f"{name}.onnx", inputs=splits.val)
            for name, module in (("base", base), (folder.name, model))
        ]
    with stage("measure latency", seconds):
        measured = zoo.benchmark(
            base, model, options=zoo.BenchmarkOptions(batch_sizes=BATCH_SIZES, memory=False)
        )

    record: PruningRecord = model.pruning
    plan = record.plan
    weights = (base_path.stat().st_size, (folder / "model.safetensors").stat().st_size)
    rows = [
        ("parameters", plan.dense.params, plan.pruned.params),
        (f"MACs at {config.size}x{config.size}", plan.dense.macs, plan.pruned.macs),
        ("weights file, bytes", *weights),
        ("ONNX file, bytes", *(result.bytes for result in exports)),
        ("accuracy before fine-tuning", base_accuracy, before),
        ("accuracy after fine-tuning", base_accuracy, after),
        *(
            (
                f"latency of a batch of {row.dense.batch}, ms",
                row.dense.latency.median_ms,
                row.pruned.latency.median_ms,
            )
            for row in measured
        ),
    ]
    print_table(rows, f"{ARCH} on {splits.train.name}, {CF}x {plan.metric} by {plan.profile}")
    parity = exports[1]
    print(
        f"ONNX Runtime (on the CPU) against PyTorch on {parity.images} images: "
        f"largest difference {parity.max_abs_difference:.2g}, top-1 agreement "
        f"{parity.top1_agreement:.2%}. Reloaded outputs are bit-identical."
    )
    report = {
        "data": splits.train.name,
        "split_digest": splits.digest,
        "profile": plan.profile,
        "factor": {"metric": plan.metric, "asked": plan.asked, "got": plan.got},
        "rows": [{"what": what, "base": dense, "pruned": pruned} for what, dense, pruned in rows],
        "parity": asdict(parity) | {"path": parity.path.name},
        "recipes": {"base": train_recipe, "fine-tune": tune_recipe},
        "seconds": seconds,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": record.versions,
    }
    write_json(config.out / "quickstart.json", report)
    print(f"Total {sum(seconds.values()):.0f} s. Everything is in {config.out}/.")


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Print the name of a stage and its seconds, and add these to `seconds`."""
    print(f"{name} ...", end=" ", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 2)
    print(f"{seconds[name]:.1f} s", flush=True)


def train(model: torch.nn.Module, splits: Splits, recipe: zoo.Recipe, seed: int) -> None:
    """Train on the training images; Ctrl-C, which ends a training early, ends the run."""
    result = zoo.finetune(model, splits.train, splits.val, recipe=recipe, seed=seed)
    if result.interrupted:
        raise KeyboardInterrupt


def check_identical(model: torch.nn.Module, again: torch.nn.Module, images: torch.Tensor) -> None:
    """Refuse a reloaded network whose outputs differ in any bit."""
    device = next(model.parameters()).device
    images = images.to(device)
    with torch.inference_mode():
        if not torch.equal(model(images), again.to(device)(images)):
            raise zoo.ZooError("The reloaded network does not compute the same outputs.")


def print_table(rows: list[tuple[str, float, float]], title: str) -> None:
    """Base beside pruned; sizes and times with their ratio, accuracies with their difference."""
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("base", "pruned", "ratio"):
        table.add_column(column, justify="right")
    for what, base, pruned in rows:
        if what.startswith("accuracy"):
            cells = f"{base:.2%}", f"{pruned:.2%}", f"{100 * (pruned - base):+.2f} points"
        elif isinstance(base, int):
            cells = f"{base:,}", f"{pruned:,}", f"{base / pruned:.2f}x"
        else:
            cells = f"{base:.2f}", f"{pruned:.2f}", f"{base / pruned:.2f}x"
        table.add_row(what, *cells)
    rich.console.Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Quickstart))
    except zoo.ZooError as error:
        sys.exit(f"quickstart: error: {error}")
