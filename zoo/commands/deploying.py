"""`zoo export`, `benchmark` and `compare`: a network in ONNX Runtime."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from tyro.conf import Positional, arg

import zoo
from zoo.commands.shared import SEED, SIZE, read_network
from zoo.common.sizes import Size, sides, spelled
from zoo.deployment.options import BenchmarkOptions, ExportOptions
from zoo.errors import ZooError
from zoo.spec.profile import Metric

if TYPE_CHECKING:
    from torch import nn

    from zoo.data.datasets import Splits
    from zoo.deployment.exporting import ExportResult
    from zoo.storage.dense import Dense

__all__ = [
    "BenchmarkCommand",
    "CompareCommand",
    "ExportCommand",
    "benchmark",
    "compare",
    "export",
]


@dataclass(frozen=True, kw_only=True)
class ExportCommand(ExportOptions):
    """Export a network to ONNX, and compare its outputs in ONNX Runtime with PyTorch's."""

    network: Annotated[Positional[str], arg(metavar="NETWORK")]
    """folder of a pruned network, or a checkpoint"""
    out: Annotated[Positional[Path], arg(metavar="FILE")]
    """ONNX file to write"""
    data: str | None = None
    """data set whose validation images outputs are compared on, by default noise; int8 needs one"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: Annotated[Size | None, SIZE] = None
    """image size: pixels per side, or height and width as 96x320; by default the network's own"""
    precision: str = "fp32"
    """precision of weights and arithmetic: fp32, fp16, int8, or int8-symmetric for TensorRT"""
    arch: str | None = None
    """architecture of a checkpoint whose file does not name it"""


def export(command: ExportCommand) -> None:
    import torch

    from zoo.tracing.calls import image_channels

    network = read_network(command.network, command.arch, command.size)
    images = None
    if command.data is not None:
        images = zoo.load_data(command.data, command.data_dir, size=network.size).val
    example = torch.zeros(1, image_channels(network.module), *sides(network.size))
    result = zoo.export(
        network.module,
        command.out,
        inputs=images,
        example_input=example,
        precision=command.precision,
        options=dataclasses.replace(command, arch=network.arch),
    )
    padded = f", widths padded to multiples of {result.pad}" if result.pad > 1 else ""
    print(
        f"Wrote {result.path} ({result.bytes:,} bytes{padded}). ONNX Runtime against PyTorch on "
        f"{result.images} images ({result.inputs}): largest difference "
        f"{result.max_abs_difference:.2g}, {_agreement(result)}"
    )
    if result.unpadded:
        print(f"The widths were not padded, which may be slow. {result.unpadded}")
    if result.accuracy is not None and result.module_accuracy is not None:
        print(
            f"Accuracy on these images: {result.module_accuracy:.2%} in PyTorch, "
            f"{result.accuracy:.2%} in {result.precision}"
        )


def _agreement(result: ExportResult) -> str:
    if result.top1_agreement is not None:
        return f"top-1 agreement {result.top1_agreement:.2%}"
    return f"R² {result.r2:.4f}"


@dataclass(frozen=True, kw_only=True)
class BenchmarkCommand(BenchmarkOptions):
    """Compare a pruned network's latency with the dense one's, and their ratio with the MACs'."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """pruned network, as `zoo prune` writes it"""
    seed: Annotated[int, SEED] = 0
    """of the images, which are noise"""


def benchmark(command: BenchmarkCommand) -> None:
    from zoo.commands.rendering import benchmark_table, print_tables
    from zoo.deployment.measurement import machine
    from zoo.models import build_model

    pruned = zoo.load_pruned(command.folder)
    record: Any = pruned.pruning
    # latency does not depend on the weights
    dense = build_model(
        record.architecture,
        record.num_classes,
        image_size=record.size,
        in_channels=record.in_channels,
    )
    print_tables([benchmark_table(zoo.benchmark(dense, pruned, options=command))])
    print(machine(command.threads))


@dataclass(frozen=True, kw_only=True)
class CompareCommand(BenchmarkOptions):
    """Compare several networks, or one network pruned by several profiles or policies."""

    networks: Annotated[Positional[tuple[str, ...]], arg(metavar="NETWORK")]
    """folders of pruned networks, or checkpoints; with --cf, profiles, policies or `dense`"""
    arch: str | None = None
    """architecture of checkpoints whose files do not name it; with --cf, the one to prune"""
    cf: float | None = None
    """compression factor of the profiles"""
    metric: Metric = "params"
    """cost that the factor refers to"""
    weights: str | None = None
    """dense checkpoint to prune; by default a new network with random weights"""
    classes: int = 10
    """number of classes of the new network"""
    data: str | None = None
    """data set whose test images accuracies are measured on, and whose training images policies
    see"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: Annotated[Size | None, SIZE] = None
    """image size: pixels per side, or height and width as 96x320; by default the networks' own"""
    seed: Annotated[int, SEED] = 0
    """of the images, which are noise"""


def compare(command: CompareCommand) -> None:
    import torch

    from zoo.commands.rendering import comparison_table, print_tables
    from zoo.deployment.measurement import machine
    from zoo.tracing.calls import image_channels

    if not command.networks:
        raise ZooError("Compare which networks? Name at least one.")
    if command.cf is None:
        found = {name: read_network(name, command.arch, command.size) for name in command.networks}
        networks = {name: network.module for name, network in found.items()}
        sizes = {network.size for network in found.values()}
        if len(sizes) > 1:
            raise ZooError(
                f"These networks are for images of "
                f"{', '.join(map(spelled, sorted(sizes, key=sides)))} pixels per side; name one "
                f"size for all with --size."
            )
        (size,) = sizes
        splits = _splits(command, size)
    else:
        dense = _dense(command)
        size = dense.image_size
        splits = _splits(command, size)
        networks = _pruned_by(command, command.cf, dense, splits)
    channels = image_channels(next(iter(networks.values())))
    example = torch.zeros(1, channels, *sides(size))
    test = None if splits is None else splits.test
    rows = zoo.compare(networks, data=test, example_input=example, options=command)
    print_tables([comparison_table(rows)])
    print(machine(command.threads))


def _splits(command: CompareCommand, size: Size) -> Splits | None:
    if command.data is None:
        return None
    return zoo.load_data(command.data, command.data_dir, size=size)


def _dense(command: CompareCommand) -> Dense:
    """The network to prune."""
    from zoo.storage.dense import load_dense

    if command.arch is None:
        raise ZooError("Profiles of which architecture? Add --arch.")
    weights: Any = command.weights or zoo.create_model(
        command.arch, command.classes, image_size=command.size
    )
    return load_dense(command.arch, weights, image_size=command.size)


def _pruned_by(
    command: CompareCommand, cf: float, dense: Dense, splits: Splits | None
) -> dict[str, nn.Module]:
    """Name -> the network, pruned by that profile or policy, or `dense`."""
    return {
        name: dense.module
        if name == "dense"
        else zoo.load(
            cast(str, command.arch),
            cf,
            dense.module,
            profile=name,
            metric=command.metric,
            data=None if splits is None else splits.train,
            image_size=dense.image_size,
        )
        for name in command.networks
    }
