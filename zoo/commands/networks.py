"""`zoo train`, `prune`, `finetune` and `evaluate`: from images to a small network."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

import zoo
from zoo.commands.shared import INTERRUPTED, SEED, SIZE, read_network
from zoo.common.sizes import Size, spelled
from zoo.errors import ZooError
from zoo.spec.profile import Metric

if TYPE_CHECKING:
    from torch import nn

    from zoo.data.datasets import Splits
    from zoo.training.finetuning import TrainResult
    from zoo.training.recipes import Recipe

__all__ = [
    "EvaluateCommand",
    "FinetuneCommand",
    "PruneCommand",
    "TrainCommand",
    "evaluate",
    "finetune",
    "prune",
    "train",
]


@dataclass(frozen=True, kw_only=True)
class _Training:
    """Flags that `train` and `finetune` share."""

    data: str
    """data set: digits, cifar10, cifar100, imagefolder:PATH, hf:ORG/NAME"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    recipe: str = "standard"
    """quick, standard, long, or a TOML file"""
    epochs: int | None = None
    """number of epochs, instead of the recipe's"""
    lr: float | None = None
    """peak learning rate, instead of the recipe's"""
    seed: Annotated[int, SEED] = 0
    """seed of shuffling, augmentation and new weights"""
    resume: bool = False
    """continue an interrupted training of this output after its last finished epoch"""
    track: tuple[str, ...] = ()
    """experiment trackers to log to (tensorboard, wandb, mlflow, ...)"""


@dataclass(frozen=True, kw_only=True)
class TrainCommand(_Training):
    """Train a dense network from scratch; the validation split is not trained on."""

    arch: str
    """architecture: a name from `zoo list`, torchvision:NAME or timm:NAME"""
    out: Path
    """checkpoint to write, a .safetensors file"""
    size: Annotated[Size, SIZE] = 32
    """size that images are resized to: pixels per side, or height and width as 96x320"""


def train(command: TrainCommand) -> int | None:
    from zoo.storage.artefacts import save_checkpoint
    from zoo.training.savepoints import check_folder

    recipe = _recipe(command)
    if command.out.is_dir():
        raise ZooError(f"{command.out} is a folder; name a file in it, such as base.safetensors.")
    if command.out.suffix != ".safetensors":
        raise ZooError(f"zoo train writes safetensors: {command.out} must end in .safetensors.")
    check_folder(command.out.absolute().parent)
    folder = command.out.with_name(f"{command.out.name}.training")
    splits = zoo.load_data(command.data, command.data_dir, size=command.size)
    model = zoo.create_model(
        command.arch, splits.num_classes, image_size=command.size, seed=command.seed
    )
    result = _fit(command, model, splits, recipe, folder)
    if not _main_process():
        return None
    metadata = {
        "architecture": command.arch,
        "num_classes": str(splits.num_classes),
        "image_size": spelled(command.size),
        "data": splits.train.name,
        "split_digest": splits.digest,
        "val_accuracy": f"{result.accuracy:.4f}",
        "recipe": json.dumps(dataclasses.asdict(recipe)),
        "seed": str(command.seed),
    }
    test = None
    if not (result.interrupted and command.out.exists()):
        save_checkpoint(model, command.out, metadata)
        test = _tested(model, splits, command.out)
        save_checkpoint(model, command.out, metadata | {"test_accuracy": f"{test:.4f}"})
    return _report_training(result, test, recipe, command.out, folder)


@dataclass(frozen=True, kw_only=True)
class PruneCommand:
    """Prune a dense checkpoint by a profile that was found on other data."""

    arch: Annotated[Positional[str], arg(metavar="ARCH")]
    """architecture of the checkpoint"""
    cf: float | None = None
    """compression factor, dense / pruned: at least 1; a reference has one of its own"""
    weights: str
    """checkpoint: a path (.safetensors, .pt, .pth), bundled:ARCH/NAME (see zoo list), or
    hf:ORG/REPO[/FILE][@REVISION]"""
    out: Path
    """folder to write the pruned network to"""
    profile: str = "best"
    """best; searched; a reference (bundled:ARCH/NAME, published:NAME, file:PATH, hf:ORG/REPO); or a
    policy: equal, increasing, decreasing, residual-dense, random, greedy, global-l2, global-lamp,
    global-bn, learned, learned:FOLDER; or, with --data, knapsack, global, global-fisher,
    global-per-cost, global-fisher-per-cost"""
    metric: Metric = "params"
    """cost that the factor refers to; latency is measured once on this machine, in PyTorch on the
    CPU at batch 1, or in ONNX Runtime with --provider"""
    provider: str | None = None
    """ONNX Runtime's provider that the exported file will run on: cpu, cuda, tensorrt"""
    precision: str | None = None
    """precision of the exported file, with --provider: fp32 (the default), or fp16 on a GPU"""
    batch: int | None = None
    """images per call of the exported file, with --provider; by default 1"""
    threads: int | None = None
    """threads of ONNX Runtime on the CPU, with --provider; by default one per core"""
    criterion: str = "random"
    """which channels are kept: random, l1, l2, fpgm, bn_scale, synflow; or, with --data, taylor,
    taylor_weight, fisher, obd, snip, apoz, reinforce"""
    init: Literal["pretrained", "random", "rewound"] = "pretrained"
    """weights of the pruned network: the checkpoint's, new ones, or those of --rewind"""
    rewind: str | None = None
    """checkpoint of the same dense network, untrained or early in training, for --init rewound"""
    refit: bool = False
    """rescale the profile so that it meets the factor on this network"""
    align: int | None = None
    """kept widths are multiples of this, or the full width; for a policy, or --refit; by default 1,
    or with --provider what that is measured to compute without waste"""
    floor: float = 0.0
    """smallest keep ratio of any channel group; for a policy, or --refit"""
    keep: dict[str, float] = dataclasses.field(default_factory=dict)
    """module names or prefixes with fixed keep ratios, as `layer3 1.0`; for a policy, or --refit"""
    seed: Annotated[int, SEED] = 0
    """seed of the random choices"""
    data: str | None = None
    """data set whose training images the criterion uses, named as in zoo train"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: Annotated[Size | None, SIZE] = None
    """image size: pixels per side, or height and width as 96x320; by default the checkpoint's, or
    that of the architecture's reference"""
    classes: int | None = None
    """classes; a checkpoint without a classifier, or with other classes, gets a new classifier"""
    ema: bool = True
    """use the averaged (EMA) weights of a checkpoint that holds both averaged and current ones"""


def prune(command: PruneCommand) -> None:
    from zoo.commands.rendering import pruning_summary
    from zoo.planning.best import BEST, reason
    from zoo.storage.dense import load_dense

    runtime, images = _runtime(command), None
    if command.data is not None:
        dense = load_dense(
            command.arch, command.weights, num_classes=command.classes, ema=command.ema
        )
        size = command.size or dense.image_size
        images = zoo.load_data(command.data, command.data_dir, size=size).train
    model = zoo.load(
        command.arch,
        command.cf,
        command.weights,
        profile=command.profile,
        metric=command.metric,
        criterion=command.criterion,
        init=command.init,
        rewind=command.rewind,
        seed=command.seed,
        align=command.align,
        floor=command.floor,
        keep=command.keep,
        refit=command.refit,
        data=images,
        runtime=runtime,
        image_size=command.size,
        num_classes=command.classes,
        ema=command.ema,
    )
    zoo.save(model, command.out)
    record: Any = model.pruning
    print(pruning_summary(record))
    if command.profile == BEST:
        plan = record.plan
        data, arch = images is not None, command.arch
        print(reason(plan.profile, plan.metric, plan.asked, data=data, arch=arch))
    print(f"Wrote {command.out}")


def _runtime(command: PruneCommand) -> zoo.Runtime | None:
    """What the network will run on, by the flags; None without --provider."""
    names = ("provider", "precision", "batch", "threads")
    given = {name: getattr(command, name) for name in names if getattr(command, name) is not None}
    if given and "provider" not in given:
        raise ZooError(f"--{next(iter(given))} needs --provider: cpu, cuda or tensorrt.")
    return zoo.Runtime(**given) if given else None


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand(_Training):
    """Fine-tune a pruned network, and keep the weights of the best validation accuracy."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """pruned network, as `zoo prune` writes it"""
    size: Annotated[Size | None, SIZE] = None
    """image size: pixels per side, or height and width as 96x320; by default the network's own"""
    teacher: str = "auto"
    """dense checkpoint to distil from; or source (the checkpoint that was pruned), auto (source if
    it can be read), or none"""
    out: Path | None = None
    """folder to write to; by default FOLDER itself"""


def finetune(command: FinetuneCommand) -> int | None:
    from zoo.storage.artefacts import check_place
    from zoo.storage.checkpoints import RECORD
    from zoo.storage.dense import load_dense
    from zoo.training.savepoints import check_folder

    recipe = _recipe(command)
    model = zoo.load_pruned(command.folder)
    record: Any = model.pruning
    size = command.size or record.size
    out = command.out or command.folder
    check_place(out)
    check_folder(out if out.exists() else out.absolute().parent)
    splits = zoo.load_data(command.data, command.data_dir, size=size)
    teacher: Any = None if command.teacher == "none" else command.teacher
    if teacher not in (None, "auto", "source"):
        teacher = load_dense(record.architecture, teacher, image_size=size).module
    result = _fit(command, model, splits, recipe, out, teacher)
    if not _main_process():
        return None
    test = None
    # in place the best weights are no worse than those they replace
    other = (out / RECORD).exists() and not out.samefile(command.folder)
    if not (result.interrupted and other):
        zoo.save(model, out)
        test = _tested(model, splits, out)
    return _report_training(result, test, recipe, out, out)


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Top-1 accuracy of a pruned network, or of a dense checkpoint."""

    network: Annotated[Positional[str], arg(metavar="NETWORK")]
    """folder of a pruned network, or a checkpoint"""
    data: str
    """data set: digits, cifar10, cifar100, imagefolder:PATH, hf:ORG/NAME"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: Annotated[Size | None, SIZE] = None
    """image size: pixels per side, or height and width as 96x320; by default the network's own"""
    split: Literal["train", "val", "test"] = "test"
    """which split to measure on"""
    arch: str | None = None
    """architecture of a checkpoint whose file does not name it"""


def evaluate(command: EvaluateCommand) -> None:
    network = read_network(command.network, command.arch, command.size)
    splits = zoo.load_data(command.data, command.data_dir, size=network.size)
    measured = zoo.evaluate(network.module, getattr(splits, command.split))
    print(
        f"{measured.accuracy:.2%} top-1, cross-entropy {measured.loss:.4f}, on the "
        f"{measured.images:,} {command.split} images of {splits.test.name}"
    )


def _recipe(command: _Training) -> Recipe:
    from zoo.training.recipes import read_recipe

    given = {"epochs": command.epochs, "lr": command.lr}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key, value in changes.items():
        if not value > 0:
            raise ZooError(f"--{key} must be positive, got {value}.")
    return dataclasses.replace(read_recipe(command.recipe), **changes)


def _fit(
    command: _Training,
    model: nn.Module,
    splits: Splits,
    recipe: Recipe,
    folder: Path,
    teacher: Any = None,
) -> TrainResult:
    """Train; keep the weights that are best on the validation split; save state in `folder`."""
    return zoo.finetune(
        model,
        splits.train,
        splits.val,
        teacher=teacher,
        recipe=recipe,
        seed=command.seed,
        checkpoint=folder,
        resume=command.resume,
        trackers=command.track,
    )


def _main_process() -> bool:
    """Whether this training process is the one that writes files and prints."""
    from accelerate import PartialState

    return PartialState().is_main_process


def _tested(model: nn.Module, splits: Splits, out: Path) -> float:
    """The test accuracy of a network that is written to `out`; an error says that it is."""
    try:
        return zoo.evaluate(model, splits.test).accuracy
    except ZooError as error:
        raise ZooError(f"Wrote {out}, but cannot measure its test accuracy: {error}") from error


def _report_training(
    result: TrainResult, test: float | None, recipe: Recipe, out: Path, folder: Path
) -> int | None:
    """Print the results, plot the history into `folder`, and return the exit code.

    Without `test` an interrupted training has left an older network in `out` alone.
    """
    from zoo.commands.rendering import training_summary
    from zoo.training.savepoints import discard

    print(training_summary(result, test, recipe.epochs))
    print(f"{out} was there before and is left as it was." if test is None else f"Wrote {out}")
    if result.history and importlib.util.find_spec("matplotlib"):
        from zoo.common import plots

        plots.save(plots.training_curves(result.history), folder / "history.png")
    if result.interrupted:
        print("Add --resume to go on.")
        return INTERRUPTED
    discard(folder)
    return None
