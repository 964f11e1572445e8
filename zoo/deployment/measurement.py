"""Measure networks side by side in ONNX Runtime: their MACs, size, time and memory.

Every network is exported, and the files take turns, call by call, so that a busy machine slows all
of them alike. Images are noise. On a GPU, images and logits stay there: no copy is timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from zoo.deployment.exporting import ExportResult, export
from zoo.deployment.options import BenchmarkOptions, ExportOptions
from zoo.deployment.parity import cpu_copy, outputs_of
from zoo.deployment.peak_memory import peak_memory
from zoo.deployment.program import PRECISIONS
from zoo.deployment.providers import GPUS, onnxruntime_module
from zoo.deployment.runtime import InferenceSession
from zoo.errors import ExportError, ZooError, integer, unknown
from zoo.models import parameter_count
from zoo.planning.latency import device_name
from zoo.spec.plans import record_of
from zoo.tracing.calls import checked_inputs, input_shapes, shapes_of
from zoo.tracing.macs import macs_of_call
from zoo.training.finetuning import evaluate

__all__ = [
    "BenchmarkRow",
    "ComparisonRow",
    "Latency",
    "Measurement",
    "benchmark",
    "compare",
    "machine",
    "time_calls",
]

CALIBRATION_IMAGES = 64


@dataclass(frozen=True)
class Latency:
    """Wall times of one call in milliseconds: median, 10th and 90th percentile of `repeats`."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int

    def __str__(self) -> str:
        """`median (p10-p90)`, with three significant digits each."""
        times = self.median_ms, self.p10_ms, self.p90_ms
        median, low, high = (f"{float(f'{ms:.3g}'):g}" for ms in times)
        return f"{median} ({low}-{high})"


@dataclass(frozen=True)
class Measurement:
    """One network's file on one provider, at one precision and batch size.

    Attributes:
        bytes: size of the file.
        peak_bytes: peak memory of loading it and one call; None if unknown.
        pad: its widths were padded to multiples of this; 1 for none.
    """

    network: str
    provider: str
    precision: str
    batch: int
    latency: Latency
    bytes: int
    peak_bytes: int | None
    pad: int = 1

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.latency.median_ms


@dataclass(frozen=True)
class BenchmarkRow:
    """Dense beside pruned; every ratio is dense / pruned.

    Attributes:
        macs_ratio: of one forward pass; the speedup if time depended on MACs alone.
    """

    dense: Measurement
    pruned: Measurement
    macs_ratio: float

    @property
    def ratio(self) -> float:
        """Of the median latencies."""
        return self.dense.latency.median_ms / self.pruned.latency.median_ms

    @property
    def efficiency(self) -> float:
        """The ratio of latencies as a share of the ratio of MACs."""
        return self.ratio / self.macs_ratio

    @property
    def verdict(self) -> str:
        """The ratio in words."""
        if 0.995 < self.ratio < 1.005:
            return "as fast"
        if self.ratio > 1:
            return f"{self.ratio:.2f}x faster"
        return f"{1 / self.ratio:.2f}x slower"


@dataclass(frozen=True)
class ComparisonRow:
    """Costs and latencies of one of several networks; `accuracy` in [0, 1], None without data."""

    network: str
    params: int
    macs: int
    accuracy: float | None
    measurements: tuple[Measurement, ...]


def benchmark(
    dense: nn.Module,
    pruned: nn.Module,
    *,
    example_input: Tensor | None = None,
    options: BenchmarkOptions | None = None,
) -> tuple[BenchmarkRow, ...]:
    """Measure how much faster the pruned network is, and how many fewer MACs it has.

    Args:
        dense, pruned: classifiers of images (N, C, H, W); weights do not matter.
        example_input: a batch (N, C, H, W). A pruned network knows its own shape.
        options: what is measured, and how often.

    Returns:
        A row per precision, provider and batch size, in the order of the options.

    Raises:
        ExportError: if a network cannot be exported, or a provider not be used.
        ZooError: if there is nothing to measure.
    """
    networks = {"dense": dense, "pruned": pruned}
    shape = _image_shape(networks, example_input)
    ratio = _macs("dense", dense, shape) / _macs("pruned", pruned, shape)
    measured = _measured(networks, shape, options or BenchmarkOptions())  # by turns
    return tuple(BenchmarkRow(*pair, ratio) for pair in zip(measured, measured, strict=True))


def compare(
    networks: Mapping[str, nn.Module],
    *,
    data: Dataset[Any] | DataLoader[Any] | None = None,
    example_input: Tensor | None = None,
    options: BenchmarkOptions | None = None,
) -> tuple[ComparisonRow, ...]:
    """Measure networks side by side: a dense one and pruned ones, or one pruned in several ways.

    Args:
        networks: by name; the rows have these names.
        data: labelled images, on which the top-1 accuracy is measured in PyTorch.
        example_input, options: as in `benchmark`.

    Raises:
        ExportError: if a network cannot be exported, or a provider not be used.
        DataError: for data that do not fit the networks; nothing was measured then.
        ZooError: if there is nothing to measure.
    """
    if not isinstance(networks, Mapping):
        raise ZooError(
            f'Give the networks by name, as {{"dense": network}}, got {type(networks).__name__}.'
        )
    shape = _image_shape(networks, example_input)
    macs = {name: _macs(name, network, shape) for name, network in networks.items()}
    accuracies = {
        name: None if data is None else evaluate(network, data).accuracy
        for name, network in networks.items()
    }
    measured = list(_measured(networks, shape, options or BenchmarkOptions()))
    return tuple(
        ComparisonRow(
            name,
            parameter_count(network),
            macs[name],
            accuracies[name],
            tuple(row for row in measured if row.network == name),
        )
        for name, network in networks.items()
    )


def time_calls(
    runs: Sequence[Callable[[], object]], *, warmup: int, repeats: int, seconds: float
) -> list[Latency]:
    """The latency of each function, which take turns.

    Args:
        runs: functions that return only when their work is done.
        warmup: rounds that are not timed, before the others.
        repeats: timed rounds.
        seconds: limit of the warmup rounds, and again of the timed ones. No round begins after it,
            but at least one is for warmup, and three are timed.

    Raises:
        ZooError: for fewer than one repeat, a negative warmup, or seconds that are not positive.
    """
    repeats, warmup = integer("repeats", repeats, 1), integer("warmup", warmup, 0)
    if not seconds > 0:
        raise ZooError(f"seconds must be positive, got {seconds!r}.")
    started = time.perf_counter()
    for turn in range(warmup):
        if turn and time.perf_counter() - started > seconds:
            break
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - started > seconds:
            break
        for run, taken in zip(runs, times, strict=True):
            before = time.perf_counter()
            run()
            taken.append((time.perf_counter() - before) * 1e3)
    return [_latency(taken) for taken in times]


def _latency(times: Sequence[float]) -> Latency:
    low, median, high = np.percentile(times, (10, 50, 90)).tolist()
    return Latency(median, low, high, len(times))


def _measured(
    networks: Mapping[str, nn.Module], shape: tuple[int, ...], options: BenchmarkOptions
) -> Iterator[Measurement]:
    """Every network in turn, for every precision, provider and batch size in turn."""
    if not (networks and options.batch_sizes and options.precisions):
        raise ZooError("There is nothing to measure: name networks, batch sizes and precisions.")
    batch_sizes = [integer("batch size", size, 1) for size in options.batch_sizes]
    for precision in options.precisions:
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
    for precision in options.precisions:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            files = {
                name: _exported(network, folder / f"{number}.onnx", shape, precision, options)
                for number, (name, network) in enumerate(networks.items())
            }
            for provider in options.providers or (None,):
                for batch in batch_sizes:
                    yield from _at(files, provider, precision, (batch, *shape), options)


def _exported(
    network: nn.Module,
    path: Path,
    shape: tuple[int, ...],
    precision: str,
    options: BenchmarkOptions,
) -> ExportResult:
    """Export a network; the agreement of classes does not matter."""
    images = _noise((CALIBRATION_IMAGES, *shape), options.seed)
    pad = None if record_of(network) is None else options.pad
    asked = ExportOptions(min_agreement=0, pad=pad)
    return export(network, path, inputs=images, precision=precision, options=asked)


def _at(
    files: Mapping[str, ExportResult],
    provider: str | None,
    precision: str,
    shape: tuple[int, ...],
    options: BenchmarkOptions,
) -> list[Measurement]:
    sessions = {
        name: InferenceSession(
            file.path, provider, threads=options.threads, cuda_graph=options.cuda_graph
        )
        for name, file in files.items()
    }
    images = _noise(shape, options.seed)
    used = {name: session.providers[0] for name, session in sessions.items()}
    given = images.cuda() if set(used.values()) <= set(GPUS) else images.numpy()
    latencies = time_calls(
        [partial(session, given) for session in sessions.values()],
        warmup=options.warmup,
        repeats=options.repeats,
        seconds=options.seconds,
    )
    del sessions
    return [
        Measurement(
            name,
            used[name],
            precision,
            shape[0],
            latency,
            file.bytes,
            peak_memory(file.path, used[name], shape, options.threads) if options.memory else None,
            file.pad,
        )
        for (name, file), latency in zip(files.items(), latencies, strict=True)
    ]


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _image_shape(
    networks: Mapping[str, nn.Module], example_input: Tensor | None
) -> tuple[int, ...]:
    """(C, H, W) of the images that all of the networks take."""
    if example_input is not None:
        taken = {shapes_of(checked_inputs(example_input))}
    else:
        records = ((network, record_of(network)) for network in networks.values())
        taken = {
            input_shapes(network, record.image_size, record.plan.inputs)
            for network, record in records
            if record is not None
        }
    shapes = {tuple(of.shape[1:] for of in inputs) for inputs in taken}
    if len(shapes) != 1:
        said = ", ".join(sorted(str(*of) if len(of) == 1 else str(of) for of in shapes))
        raise ZooError(
            f"Which images are these networks for? Pass example_input=, a batch of them; the "
            f"networks say {said or 'nothing'}."
        )
    (shape, *others) = shapes.pop()
    if others:
        raise ZooError("Networks of one input can be measured, but these take several.")
    return shape


def _macs(name: str, network: nn.Module, shape: tuple[int, ...]) -> int:
    """MACs of one forward pass of one image.

    Raises:
        ExportError: if the network does not take such an image, or has no MACs.
    """
    module = cpu_copy(network)
    # some versions of torch do not count the fused attention of CPUs
    with sdpa_kernel(SDPBackend.MATH):
        macs = macs_of_call(partial(outputs_of, module), torch.zeros(1, *shape))
    if macs == 0:
        raise ExportError(f"{name} has no multiply-accumulates: no convolution, no dense layer.")
    return macs


def machine(threads: int | None = None) -> str:
    """The version of ONNX Runtime, the processor, and the GPU if there is one, as text."""
    cores = "" if threads is None else f" ({threads} threads)"
    names = [f"{device_name(torch.device('cpu'))}{cores}"]
    if torch.cuda.is_available():
        names.append(device_name(torch.device("cuda")))
    return f"ONNX Runtime {onnxruntime_module().__version__} on {' and '.join(names)}"
