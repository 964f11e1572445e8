"""The `zoo` command: flags -> dataclasses -> public functions.

Each command is a frozen dataclass whose fields are its flags, and a function that carries it out.
Heavy imports are inside those functions: `zoo --help` waits for none of them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

import zoo
from zoo.deployment import BenchmarkOptions, ExportOptions
from zoo.errors import ZooError, unknown

if TYPE_CHECKING:
    from torch import nn

    from zoo.recipes import Recipe
    from zoo.training import TrainResult

__all__ = ["COMMANDS", "main"]

INTERRUPTED = 130
USER_ERROR = 2

Metric = Literal["params", "macs", "latency"]


@dataclass(frozen=True, kw_only=True)
class ListCommand:
    """The profiles that exist, and the architectures that have none."""

    arch: str | None = None
    """only of this architecture"""
    metric: Metric | None = None
    """only of this metric"""
    source: str = "bundled"
    """bundled, or hf:ORG/REPO[@REVISION]"""


def list_profiles(command: ListCommand) -> None:
    from zoo.registry import list_architectures
    from zoo.rendering import print_policies, print_profiles

    entries = zoo.list_profiles(arch=command.arch, metric=command.metric, source=command.source)
    print_profiles(entries, command.arch)
    if command.arch is None and command.source == "bundled":
        searched = {entry.architecture for entry in entries}
        print_policies([name for name in list_architectures() if name not in searched])


@dataclass(frozen=True, kw_only=True)
class ShowCommand:
    """One profile: a bar per channel group, what it costs, and its evidence."""

    profile: Annotated[Positional[str], arg(metavar="PROFILE")]
    """a reference (bundled:resnet20-16/params-cf4, file:PATH), or an architecture with --cf"""
    cf: float | None = None
    """compression factor, with an architecture"""
    metric: Metric = "params"
    """what the factor counts, with an architecture; latency is of one device"""


def show(command: ShowCommand) -> None:
    from zoo.registry import find_profile
    from zoo.rendering import print_profile

    arch = None
    if command.cf is not None:
        arch = command.profile
        reference, profile = find_profile(arch, command.cf, command.metric)
    elif ":" in command.profile:
        reference, profile = command.profile, zoo.get_profile(command.profile)
    else:
        raise ZooError(f"Which factor of {command.profile!r}? Add --cf, or give a reference.")
    print_profile(reference, profile, arch)


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a dense network from scratch; its validation split stays unseen."""

    arch: str
    """architecture: a name that `zoo list` gives, torchvision:NAME or timm:NAME"""
    data: str
    """data set: digits, cifar10, cifar100, imagefolder:PATH, hf:ORG/NAME"""
    out: Path
    """checkpoint to write, a .safetensors file"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: int = 32
    """pixels per side that the images are resized to"""
    recipe: str = "standard"
    """quick, standard, long, or a TOML file"""
    epochs: int | None = None
    """instead of the recipe's"""
    lr: float | None = None
    """peak learning rate, instead of the recipe's"""
    seed: int = 0
    """of the initial weights, shuffling and augmentation"""
    resume: bool = False
    """go on from the last epoch that an interrupted training finished"""
    track: tuple[str, ...] = ()
    """experiment trackers to tell (tensorboard, wandb, mlflow, ...)"""


def train(command: TrainCommand) -> int | None:
    from zoo.artefacts import save_checkpoint

    recipe = _recipe(command.recipe, command.epochs, command.lr)
    _check_writable(command.out)
    splits = zoo.load_data(command.data, command.data_dir, size=command.size)
    model = zoo.create_model(
        command.arch, splits.num_classes, image_size=command.size, seed=command.seed
    )
    folder = command.out.with_name(f"{command.out.name}.training")
    result = zoo.finetune(
        model,
        splits.train,
        splits.val,
        recipe=recipe,
        seed=command.seed,
        checkpoint=folder,
        resume=command.resume,
        trackers=command.track,
    )
    if not _main_process():
        return None
    test = zoo.evaluate(model, splits.test).accuracy
    metadata = {
        "architecture": command.arch,
        "num_classes": str(splits.num_classes),
        "image_size": str(command.size),
        "data": splits.train.name,
        "split_digest": splits.digest,
        "val_accuracy": f"{result.accuracy:.4f}",
        "test_accuracy": f"{test:.4f}",
        "recipe": json.dumps(dataclasses.asdict(recipe)),
        "seed": str(command.seed),
    }
    save_checkpoint(model, command.out, metadata)
    return _report_training(result, test, recipe, command.out, folder)


@dataclass(frozen=True, kw_only=True)
class PruneCommand:
    """Prune a dense checkpoint by a profile that was found on other data."""

    arch: Annotated[Positional[str], arg(metavar="ARCH")]
    """architecture of the checkpoint"""
    cf: float
    """compression factor, dense / pruned: at least 1"""
    weights: str
    """checkpoint: a path (.safetensors, .pt, .pth) or hf:ORG/REPO[/FILE][@REVISION]"""
    out: Path
    """folder to write the pruned network to"""
    profile: str = "searched"
    """searched, a policy (equal, increasing, decreasing, random, greedy), or a reference
    (file:PATH, bundled:ARCH/NAME, hf:ORG/REPO)"""
    metric: Metric = "params"
    """what the factor counts; latency is measured once, on this machine's CPU at batch 1"""
    criterion: str = "random"
    """which channels stay: random, l1, l2, fpgm, bn_scale, synflow; or, with --data, taylor,
    taylor_weight, fisher, obd, snip, apoz, reinforce"""
    init: Literal["pretrained", "random", "rewound"] = "pretrained"
    """weights of the pruned network: the checkpoint's, new ones, or those of --rewind"""
    rewind: str | None = None
    """checkpoint of the same network to go back to, early in training or untrained"""
    refit: bool = False
    """rescale the profile to meet the factor for this very network"""
    align: int = 1
    """widths are multiples of it, or whole; for a policy, or with --refit"""
    floor: float = 0.0
    """the least keep ratio of any channel group; likewise"""
    keep: dict[str, float] = dataclasses.field(default_factory=dict)
    """module name or prefix and its pinned keep ratio, as `layer3 1.0`; likewise"""
    seed: int = 0
    """of the random choices"""
    data: str | None = None
    """data set whose training images the criterion sees, named as for zoo train"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: int | None = None
    """pixels per side; by default the checkpoint's, or the architecture's reference"""


def prune(command: PruneCommand) -> None:
    from zoo.checkpoints import load_dense
    from zoo.rendering import pruning_summary

    images = None
    if command.data is not None:
        size = command.size or load_dense(command.arch, command.weights)[-1]
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
        image_size=command.size,
    )
    zoo.save(model, command.out)
    record: Any = model.pruning
    print(pruning_summary(record))
    print(f"Wrote {command.out}")


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand:
    """Train a pruned network; the weights of the best validation accuracy are kept."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """pruned network, as `zoo prune` writes it"""
    data: str
    """data set: digits, cifar10, cifar100, imagefolder:PATH, hf:ORG/NAME"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: int | None = None
    """pixels per side; by default what the network was pruned for"""
    recipe: str = "standard"
    """quick, standard, long, or a TOML file"""
    epochs: int | None = None
    """instead of the recipe's"""
    lr: float | None = None
    """peak learning rate, instead of the recipe's"""
    teacher: str = "auto"
    """dense checkpoint to distil from; source for the one that the network was pruned from, auto
    for that where it can be read, or none"""
    seed: int = 0
    """of shuffling and augmentation"""
    out: Path | None = None
    """folder to write to; by default the folder it came from"""
    resume: bool = False
    """go on from the last epoch that an interrupted fine-tune into this folder finished"""
    track: tuple[str, ...] = ()
    """experiment trackers to tell (tensorboard, wandb, mlflow, ...)"""


def finetune(command: FinetuneCommand) -> int | None:
    recipe = _recipe(command.recipe, command.epochs, command.lr)
    model = zoo.load_pruned(command.folder)
    record: Any = model.pruning
    size = command.size or record.image_size
    out = command.out or command.folder
    _check_writable(out)
    splits = zoo.load_data(command.data, command.data_dir, size=size)
    teacher: Any = None if command.teacher == "none" else command.teacher
    if teacher not in (None, "auto", "source"):
        teacher = zoo.create_model(
            record.architecture, record.num_classes, pretrained=teacher, image_size=size
        )
    result = zoo.finetune(
        model,
        splits.train,
        splits.val,
        teacher=teacher,
        recipe=recipe,
        seed=command.seed,
        checkpoint=out,
        resume=command.resume,
        trackers=command.track,
    )
    if not _main_process():
        return None
    test = zoo.evaluate(model, splits.test).accuracy
    zoo.save(model, out)
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
    size: int | None = None
    """pixels per side; by default what the network was pruned for, or the checkpoint's"""
    split: Literal["train", "val", "test"] = "test"
    """which split to measure on"""
    arch: str | None = None
    """architecture of a checkpoint that does not name its own"""


def evaluate(command: EvaluateCommand) -> None:
    model, size = _network(command.network, command.arch, command.size)
    splits = zoo.load_data(command.data, command.data_dir, size=size)
    measured = zoo.evaluate(model, getattr(splits, command.split))
    print(
        f"{measured.accuracy:.2%} top-1, cross-entropy {measured.loss:.4f}, on the "
        f"{measured.images:,} {command.split} images of {splits.test.name}"
    )


@dataclass(frozen=True, kw_only=True)
class ExportCommand(ExportOptions):
    """Write a network as ONNX, checked in ONNX Runtime against PyTorch."""

    network: Annotated[Positional[str], arg(metavar="NETWORK")]
    """folder of a pruned network, or a checkpoint"""
    out: Annotated[Positional[Path], arg(metavar="FILE")]
    """file to write, .onnx"""
    data: str | None = None
    """data set whose validation images the outputs are compared on; noise without; int8 needs it"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: int | None = None
    """pixels per side; by default what the network was pruned for, or the checkpoint's"""
    precision: str = "fp32"
    """of weights and arithmetic: fp32, fp16, int8, or int8-symmetric for TensorRT"""
    arch: str | None = None
    """architecture of a checkpoint that does not name its own"""


def export(command: ExportCommand) -> None:
    import torch

    model, size = _network(command.network, command.arch, command.size)
    images = None
    if command.data is not None:
        images = zoo.load_data(command.data, command.data_dir, size=size).val
    example = torch.zeros(1, 3, size, size)
    result = zoo.export(
        model,
        command.out,
        inputs=images,
        example_input=example,
        precision=command.precision,
        options=command,
    )
    print(
        f"Wrote {result.path} ({result.bytes:,} bytes). ONNX Runtime against PyTorch on "
        f"{result.images} images ({result.inputs}): largest difference "
        f"{result.max_abs_difference:.2g}, top-1 agreement {result.top1_agreement:.2%}"
    )
    if result.accuracy is not None and result.module_accuracy is not None:
        print(
            f"Accuracy on these images: {result.module_accuracy:.2%} in PyTorch, "
            f"{result.accuracy:.2%} in {result.precision}"
        )


@dataclass(frozen=True, kw_only=True)
class BenchmarkCommand(BenchmarkOptions):
    """Latency of a pruned network beside the dense one's, and the share of its MACs that shows."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """pruned network, as `zoo prune` writes it"""


def benchmark(command: BenchmarkCommand) -> None:
    from zoo.rendering import benchmark_table, print_tables

    pruned = zoo.load_pruned(command.folder)
    record: Any = pruned.pruning
    # times depend on no weights
    dense = zoo.create_model(record.architecture, record.num_classes, image_size=record.image_size)
    print_tables([benchmark_table(zoo.benchmark(dense, pruned, options=command))])
    _name_the_machine()


@dataclass(frozen=True, kw_only=True)
class CompareCommand(BenchmarkOptions):
    """Several networks side by side, or one pruned by several profiles or policies."""

    networks: Annotated[Positional[tuple[str, ...]], arg(metavar="NETWORK")]
    """folders of pruned networks and checkpoints; with --cf, `dense` and names of profiles"""
    arch: str | None = None
    """architecture of the checkpoints that do not name their own, or to prune"""
    cf: float | None = None
    """compression factor, for profiles"""
    metric: Metric = "params"
    """what the factor counts"""
    weights: str | None = None
    """dense checkpoint that the profiles prune; by default a fresh network"""
    classes: int = 10
    """of the fresh network"""
    data: str | None = None
    """data set whose test images the accuracies are of"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: int | None = None
    """pixels per side; by default what the networks are for"""


def compare(command: CompareCommand) -> None:
    import torch

    from zoo.rendering import comparison_table, print_tables

    if command.cf is None:
        found = {name: _network(name, command.arch, command.size) for name in command.networks}
        networks = {name: network for name, (network, _) in found.items()}
        size = max(own for _, own in found.values())
    else:
        networks, size = _pruned_by(command, command.cf)
    test = None
    if command.data is not None:
        test = zoo.load_data(command.data, command.data_dir, size=size).test
    example = torch.zeros(1, 3, size, size)
    rows = zoo.compare(networks, data=test, example_input=example, options=command)
    print_tables([comparison_table(rows)])
    _name_the_machine()


def _pruned_by(command: CompareCommand, cf: float) -> tuple[dict[str, nn.Module], int]:
    """One network as it is (`dense`) and as the profiles prune it, and its image size."""
    from zoo.checkpoints import load_dense

    if command.arch is None:
        raise ZooError("Profiles of which architecture? Add --arch.")
    weights: Any = command.weights or zoo.create_model(
        command.arch, command.classes, image_size=command.size
    )
    dense, _, _, size = load_dense(command.arch, weights, image_size=command.size)
    return {
        name: dense
        if name == "dense"
        else zoo.load(
            command.arch, cf, weights, profile=name, metric=command.metric, image_size=size
        )
        for name in command.networks
    }, size


def _name_the_machine() -> None:
    import onnxruntime
    import torch

    from zoo.latency import device_name

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    names = " and ".join(device_name(torch.device(kind)) for kind in devices)
    print(f"ONNX Runtime {onnxruntime.__version__} on {names}")


@dataclass(frozen=True)
class SearchCommand:
    """Search for profiles with reinforcement learning, or another agent."""


def search(command: Any) -> None:
    from zoo.rendering import headline
    from zoo.search.campaign import search_profile

    for profile in search_profile(command):
        print(f"{command.out / profile.name}.json: {headline(profile)}")


@dataclass(frozen=True, kw_only=True)
class LedgerCommand:
    """What ledgers of searches hold: evaluations by fidelity and source, and the best profiles."""

    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="PATH")]
    """ledgers (.jsonl, .parquet) or folders of runs"""
    arch: str | None = None
    """their architecture, which the factors are of"""
    top: int = 10
    """best profiles to show per base network and fidelity"""
    cf: float | None = None
    """only profiles at this factor, with --arch"""
    metric: Metric = "params"
    """what the factor counts"""
    plot: Path | None = None
    """plot accuracy against the factor into this .png or .svg file, with --arch"""


def ledger(command: LedgerCommand) -> None:
    from zoo.rendering import print_tables
    from zoo.search.summary import ledger_report, plot_ledger

    print_tables(
        ledger_report(
            command.paths, command.arch, top=command.top, cf=command.cf, metric=command.metric
        )
    )
    if command.plot is not None:
        plot_ledger(command.paths, command.arch, command.plot, command.metric)
        print(f"Wrote {command.plot}")


COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "list": (ListCommand, list_profiles),
    "show": (ShowCommand, show),
    "train": (TrainCommand, train),
    "prune": (PruneCommand, prune),
    "finetune": (FinetuneCommand, finetune),
    "evaluate": (EvaluateCommand, evaluate),
    "export": (ExportCommand, export),
    "benchmark": (BenchmarkCommand, benchmark),
    "compare": (CompareCommand, compare),
    "search": (SearchCommand, search),
    "ledger": (LedgerCommand, ledger),
}
"""Name -> (flags, what carries it out)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is 2 on a user's error and 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if given[0] not in COMMANDS and not given[0].startswith("-"):
            raise unknown("command", given[0], COMMANDS)
        command = tyro.extras.subcommand_cli_from_dict(
            {name: _flags(name, given) for name in COMMANDS},
            prog="zoo",
            description="A model zoo of out-of-the-box channel-pruned networks.",
            args=given,
        )
        return COMMANDS[given[0]][1](command) or 0
    except (ZooError, OSError) as error:
        print(f"zoo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return INTERRUPTED


def _flags(name: str, given: Sequence[str]) -> Any:
    """The dataclass of a command; the search's own is heavy, and imported when it is asked for."""
    if name == "search" == given[0]:
        from zoo.search.campaign import SearchConfig

        return SearchConfig
    return COMMANDS[name][0]


def _recipe(name: str, epochs: int | None, lr: float | None) -> Recipe:
    from zoo.recipes import read_recipe

    given = {"epochs": epochs, "lr": lr}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key, value in changes.items():
        if not value > 0:
            raise ZooError(f"--{key} must be positive, got {value}.")
    return dataclasses.replace(read_recipe(name), **changes)


def _network(path: str, arch: str | None, size: int | None) -> tuple[nn.Module, int]:
    """A pruned network's folder or a dense checkpoint as (module, image size)."""
    from zoo.checkpoints import load_dense, read_checkpoint

    if Path(path).is_dir():
        model = zoo.load_pruned(path)
        record: Any = model.pruning
        return model, size or record.image_size
    name = arch or read_checkpoint(path).metadata.get("architecture")
    if name is None:
        raise ZooError(f"{path} does not say which architecture it belongs to; add --arch.")
    model, _, _, own = load_dense(name, path, image_size=size)
    return model, own


def _check_writable(path: Path) -> None:
    """Make the folder that `path` will be written to, and fail before the work if it can't be."""
    folder = path.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ZooError(f"{path} cannot be written: no permission in {folder}.")


def _main_process() -> bool:
    """Whether this is the one of several training processes that writes and reports."""
    from accelerate import PartialState

    return PartialState().is_main_process


def _report_training(
    result: TrainResult, test: float, recipe: Recipe, out: Path, folder: Path
) -> int | None:
    """What the training did, and its curves beside its history in `folder`."""
    from zoo.rendering import training_summary
    from zoo.savepoints import discard

    print(training_summary(result, test, recipe.epochs))
    print(f"Wrote {out}")
    if importlib.util.find_spec("matplotlib"):
        from zoo import plots

        plots.save(plots.training_curves(result.history), folder / "history.png")
    if result.interrupted:
        print("Add --resume to go on.")
        return INTERRUPTED
    discard(folder)
    return None
