"""The options of an export and of a benchmark; this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

from zoo.errors import ZooError, integer

__all__ = ["BenchmarkOptions", "ExportOptions", "Runtime", "per_channel"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export. By default a file takes normalised fp32 images of one size."""

    mean: tuple[float, ...] | None = None
    """per channel, subtracted from images in [0, 1] to normalise them; by default the data set's"""
    std: tuple[float, ...] | None = None
    """per channel, the divisor of that normalisation; by default the data set's"""
    fold: bool = False
    """normalise inside the graph, which then takes images in [0, 1]"""
    dynamic_size: bool = False
    """take images of other heights and widths too, if the network allows it"""
    half_inputs: bool = False
    """make the images and logits of an fp16 file fp16 as well"""
    pad: int | None = None
    """pad the widths of a pruned network with channels of zeros to multiples of this, which changes
    no output and makes it faster; by default 8 where possible; 1 pads nothing"""
    arch: str | None = None
    """architecture to write into the file of a dense network; a pruned one knows its own"""
    min_agreement: float | None = None
    """least share of images with PyTorch's top class; by default 0.99, and 0.97 for int8; 0 also
    takes a network that computes something else with all of its arithmetic in fp16"""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, per_channel(name, getattr(self, name)))
        if self.pad is not None:
            object.__setattr__(self, "pad", integer("pad", self.pad, 1))
        least = self.min_agreement
        if least is not None and not (isinstance(least, Real) and 0 <= least <= 1):
            raise ZooError(f"min_agreement must be a share from 0 to 1, got {least!r}.")


def per_channel(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """`values` as floats, one per channel.

    Raises:
        ZooError: for anything but numbers.
    """
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError):
        raise ZooError(f"{name} must be a number per channel, got {values!r}.") from None


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What is measured, and how often."""

    batch_sizes: tuple[int, ...] = (1, 8, 64, 256)
    """images per call"""
    precisions: tuple[str, ...] = ("fp32",)
    """of the exported files: fp32, fp16, int8"""
    providers: tuple[str, ...] = ()
    """ONNX Runtime's names, measured one after the other; by default the best that works here"""
    repeats: int = 20
    """timed calls of each network; the networks take turns"""
    warmup: int = 3
    """untimed calls of each network before them"""
    seconds: float = 20.0
    """for each batch size: stop once the calls have taken this long, after three at the earliest"""
    threads: int | None = None
    """of ONNX Runtime on the CPU; by default one per core"""
    cuda_graph: bool = False
    """record the calls to the GPU once, and replay them; the CUDA provider alone can"""
    pad: int | None = None
    """pad the widths of pruned networks, as for an export"""
    memory: bool = True
    """measure the peak memory of each network too, in a process of its own"""
    seed: int = 0
    """of the images, which are noise"""

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "precisions", "providers"):
            value = getattr(self, name)
            alone = isinstance(value, str) or not isinstance(value, Iterable)
            object.__setattr__(self, name, (value,) if alone else tuple(value))


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where an exported file will run, for plans whose latency is that of the file."""

    provider: str = "cpu"
    """of ONNX Runtime: cpu, cuda, tensorrt, or the name it has there"""
    precision: str = "fp32"
    """of the file: fp32, or fp16 on a GPU"""
    batch: int = 1
    """images per call"""
    threads: int | None = None
    """of ONNX Runtime on the CPU; by default one per core"""

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "fp16"):
            raise ZooError(
                f"Latency is measured in fp32 or fp16, not in {self.precision!r}: the time of an "
                f"int8 file depends on how its values are quantised."
            )
        object.__setattr__(self, "batch", integer("batch", self.batch, 1))
        if self.threads is not None:
            object.__setattr__(self, "threads", integer("threads", self.threads, 1))
