"""What may be asked of an export and of a benchmark; torch is not imported for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from zoo.errors import ZooError, integer

__all__ = ["BenchmarkOptions", "ExportOptions"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What an ONNX file takes besides normalised fp32 images of one size."""

    mean: tuple[float, ...] | None = None
    """per channel, what was subtracted from images of 0 to 1; by default what the data set says"""
    std: tuple[float, ...] | None = None
    """per channel, what they were divided by; likewise"""
    fold: bool = False
    """normalise inside the graph, which then takes images of 0 to 1"""
    dynamic_size: bool = False
    """take images of other heights and widths, where the network allows it"""
    half_inputs: bool = False
    """images and logits of a fp16 file are fp16 as well"""
    pad: int | None = None
    """fill the widths of a pruned network up with channels of zeros to multiples of this, which
    changes no output and makes it faster; by default 8 where that can be done, and 1 is none"""
    arch: str | None = None
    """architecture of a dense network, which the file then names; a pruned one names its own"""
    min_agreement: float | None = None
    """least share of images with PyTorch's top class; by default 0.99, and 0.97 for int8"""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if self.pad is not None:
            object.__setattr__(self, "pad", integer("pad", self.pad, 1))
        least = self.min_agreement
        if least is not None and not 0 <= least <= 1:
            raise ZooError(f"min_agreement is a share, from 0 to 1, got {least!r}.")


def _numbers(name: str, values: Iterable[float]) -> tuple[float, ...]:
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
    """calls of each network that are timed, taking turns"""
    warmup: int = 3
    """calls of each network before them"""
    seconds: float = 20.0
    """for each batch size: calls end when they have taken this long, but not before three"""
    threads: int | None = None
    """of ONNX Runtime on the CPU; by default one per core"""
    cuda_graph: bool = False
    """record the calls to the GPU once, and replay them; CUDA alone does"""
    pad: int | None = None
    """of the files of pruned networks, as for an export"""
    memory: bool = True
    """measure the peak memory of each network too, in a process of its own"""
    seed: int = 0
    """of the images, which are noise"""
