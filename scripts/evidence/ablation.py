"""Measure what each ingredient of fine-tuning is worth, from inherited and random weights.

    python scripts/evidence/ablation.py --weights base.safetensors --data cifar10 --data-dir DIR \
        --size 16 --out runs/ablation

All networks have one compression factor. Accuracies are those of the last weights on the test
split, which therefore selects nothing. Every result is written to `results.jsonl` in `--out` at
once, and a run that is started again continues, even in the middle of a training. The base network
must not have seen the test split.
"""

from __future__ import annotations

import json
import statistics
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import zoo
from zoo.data.datasets import Splits
from zoo.planning.latency import device_name
from zoo.search.tasks import sample
from zoo.storage.dense import load_dense
from zoo.training.savepoints import discard

PLAIN = zoo.Recipe()
ALL = replace(PLAIN, ema=0.99, label_smoothing=0.1, cutmix=1.0, rand_augment=5)
ARMS: dict[str, tuple[Literal["source"] | None, zoo.Recipe]] = {
    "plain": (None, PLAIN),
    "+KD": ("source", PLAIN),
    "+EMA": (None, replace(PLAIN, ema=ALL.ema)),
    "+KD, EMA": ("source", replace(PLAIN, ema=ALL.ema)),
    "+label smoothing": (None, replace(PLAIN, label_smoothing=ALL.label_smoothing)),
    "+cutmix": (None, replace(PLAIN, cutmix=ALL.cutmix)),
    "+RandAugment": (None, replace(PLAIN, rand_augment=ALL.rand_augment)),
    "all": ("source", ALL),
}
INITS: tuple[Literal["pretrained", "random"], ...] = ("pretrained", "random")


@dataclass(frozen=True)
class Ablation:
    weights: str
    """dense checkpoint"""
    out: Path
    """folder of the results"""
    arch: str = "resnet20-16"
    """its architecture"""
    data: str = "cifar10"
    """data set"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: int = 32
    """pixels per side"""
    cf: float = 4.0
    """compression factor, of params"""
    profile: str = "searched"
    """profile or policy"""
    images: int | None = None
    """training images of every fine-tune; all by default"""
    epochs: int = 20
    """of every fine-tune"""
    lr: float = 0.1
    """peak learning rate"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the channels kept and of the training, the same in every arm"""
    arms: tuple[str, ...] = tuple(ARMS)
    """which to run"""


def main(config: Ablation) -> None:
    """Train what is missing and print the table."""
    splits = zoo.load_data(config.data, config.data_dir, size=config.size)
    loaded = load_dense(config.arch, config.weights, image_size=config.size)
    dense, checkpoint = loaded.module, loaded.checkpoint
    results = Results(config.out / "results.jsonl")
    where = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    elsewhere = {"out", "arms", "seeds", "data_dir", "weights", "epochs", "lr"}
    shared = {name: value for name, value in asdict(config).items() if name not in elsewhere}
    shared |= {"weights": checkpoint.source.sha256, "device": where}

    def key_of(arm: str, init: str, seed: int) -> dict[str, Any]:
        """Everything that one accuracy depends on."""
        teacher, recipe = arm_of(config, arm)
        return shared | {"teacher": teacher, "recipe": asdict(recipe), "init": init, "seed": seed}

    for seed in config.seeds:
        for init in INITS:
            for arm in config.arms:
                if results.find(key_of(arm, init, seed)) is None:
                    accuracy = measure(config, splits, arm, init, seed)
                    results.add(key_of(arm, init, seed), accuracy)
                    print(f"seed {seed}, {init} weights, {arm}: {accuracy:.2%}", flush=True)
    table = {
        arm: [[results.find(key_of(arm, init, seed)) for seed in config.seeds] for init in INITS]
        for arm in config.arms
    }
    before = zoo.evaluate(dense, splits.test).accuracy
    print_table(config, splits, before, where, table)


def arm_of(config: Ablation, arm: str) -> tuple[Literal["source"] | None, zoo.Recipe]:
    """The teacher of an arm, and its recipe with the epochs and learning rate of `config`."""
    teacher, recipe = ARMS[arm]
    return teacher, replace(recipe, epochs=config.epochs, lr=config.lr)


class Results:
    """Accuracies by their settings, in a file of one line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(json.JSONDecodeError):  # a kill can cut a line short
                self.rows.append(json.loads(line))

    def find(self, key: dict[str, Any]) -> float | None:
        found = (row["accuracy"] for row in self.rows if row["key"] == key)
        return next(found, None)

    def add(self, key: dict[str, Any], accuracy: float) -> None:
        self.rows.append({"key": key, "accuracy": accuracy})
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(self.rows[-1]))  # \n first: the last may be cut short


def measure(
    config: Ablation, splits: Splits, arm: str, init: Literal["pretrained", "random"], seed: int
) -> float:
    """Test accuracy of one pruned network after one fine-tune."""
    teacher, recipe = arm_of(config, arm)
    model = zoo.load(
        config.arch, config.cf, config.weights, profile=config.profile, init=init, seed=seed
    )
    folder = config.out / f"{arm} {init} {seed}"
    result = zoo.finetune(
        model,
        sample(splits.train, config.images),
        None,
        teacher=teacher,
        recipe=recipe,
        seed=seed,
        checkpoint=folder,
        resume=True,
    )
    if result.interrupted:
        raise KeyboardInterrupt
    accuracy = zoo.evaluate(model, splits.test).accuracy
    discard(folder)
    return accuracy


def print_table(
    config: Ablation,
    splits: Splits,
    dense: float,
    where: str,
    table: dict[str, list[list[Any]]],
) -> None:
    """`table` has the accuracies of every seed, by arm and kind of weights."""
    images = config.images or len(splits.train)
    print(
        f"\nTest accuracy on {splits.test.name}, {config.arch} at {config.cf:g}x params by "
        f"{config.profile}, {config.epochs} epochs of {images:,} images, "
        f"lr {config.lr:g} for both kinds of weights, last weights, {len(config.seeds)} seeds, "
        f"mean ± standard deviation. The dense network has {100 * dense:.2f}. On "
        f"{where}, torch {torch.__version__}."
    )
    print(f"\n| | {' | '.join(f'{init} weights' for init in INITS)} |\n|---|---:|---:|")
    for arm, cells in table.items():
        print(f"| {arm} | {' | '.join(told(accuracies) for accuracies in cells)} |")
    print()
    for arm in table:
        teacher, recipe = ARMS[arm]
        values = [f"{k}={v}" for k, v in asdict(recipe).items() if v != getattr(PLAIN, k)]
        values += [] if teacher is None else [f"distill={recipe.distill}"]
        print(f"{arm}: {', '.join(values) or 'nothing more'}")


def told(accuracies: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{100 * statistics.mean(accuracies):.2f}{spread}"


if __name__ == "__main__":
    main(tyro.cli(Ablation))
