"""ONNX Runtime: logits of an exported file, and latencies measured side by side."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ExportError, ZooError, unknown

__all__ = ["InferenceSession", "Latency", "LatencyRow", "compare_latency", "measure_latency"]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_NEEDS = {
    _CUDA: "an NVIDIA GPU, its driver, and: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    "TensorrtExecutionProvider": "an NVIDIA GPU, its driver, TensorRT's libraries on the library "
    "path, and: pip install 'onnxruntime-gpu[cuda,cudnn]'",
}
_OTHERWISE = "the ONNX Runtime package built for it: https://onnxruntime.ai/docs/install"


class InferenceSession:
    """A classifier's ONNX file in ONNX Runtime: images to logits.

    Attributes:
        path: of the file.
        providers: that run it, the preferred one first.
        image_shape: of its input, (batch, channels, height, width); a dynamic size is None.
    """

    def __init__(self, path: str | Path, providers: Sequence[str] | None = None) -> None:
        """Load the file at `path`.

        Args:
            path: an ONNX file of one float32 input.
            providers: ONNX Runtime's names, in order of preference. By default CUDA where torch
                sees a device and ONNX Runtime can use it, otherwise the CPU.

        Raises:
            ExportError: if the file is missing, corrupt or takes other inputs, or a provider that
                was asked for cannot be used.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ExportError(f"{self.path} does not exist or is not a file.")
        self._session = _open(self.path, [providers] if isinstance(providers, str) else providers)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            got = ", ".join(f"{item.name}: {item.type}" for item in inputs) or "nothing"
            raise ExportError(f"{self.path} takes {got}; expected one float32 tensor of images.")
        self._input, self._output = inputs[0].name, self._session.get_outputs()[0].name
        self.image_shape = tuple(
            size if isinstance(size, int) else None for size in inputs[0].shape
        )

    def __call__(self, images: np.ndarray | Tensor) -> np.ndarray:
        """Logits, float32 (N, classes), of normalised floating-point images (N, C, H, W).

        Raises:
            ExportError: if the images have another shape or are not floating-point.
        """
        if isinstance(images, Tensor):
            floating = images.is_floating_point()
        else:
            floating = np.issubdtype(images.dtype, np.floating)
        shape = tuple(images.shape)
        fits = len(shape) == len(self.image_shape) and all(
            got > 0 if size is None else got == size
            for got, size in zip(shape, self.image_shape, strict=True)
        )
        if not floating or not fits:
            wanted = ", ".join("N" if size is None else str(size) for size in self.image_shape)
            raise ExportError(
                f"{self.path.name} takes floating-point images of shape ({wanted}), N at least 1; "
                f"got {images.dtype} of shape {shape}."
            )
        if isinstance(images, Tensor):
            images = images.detach().to("cpu", torch.float32).numpy()
        array = np.ascontiguousarray(images, dtype=np.float32)
        return self._session.run([self._output], {self._input: array})[0]


@dataclass(frozen=True)
class Latency:
    """Wall times of one call in milliseconds: median, 10th and 90th percentile of `repeats`."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int


@dataclass(frozen=True)
class LatencyRow:
    """Median wall times of one batch in milliseconds; `ratio` is dense / pruned."""

    batch: int
    dense_ms: float
    pruned_ms: float
    ratio: float


def measure_latency(run: Callable[[], object], *, warmup: int = 3, repeats: int = 20) -> Latency:
    """The latency of `run()`, which must return only when its work is done.

    Args:
        run: what is measured.
        warmup: calls before the first measured one.
        repeats: calls that are measured, at least one.

    Raises:
        ZooError: if there is nothing to measure.
    """
    (times,) = _interleaved((run,), warmup, repeats)
    low, median, high = np.percentile(times, (10, 50, 90)).tolist()
    return Latency(median, low, high, repeats)


def compare_latency(
    dense: Callable[[np.ndarray], object],
    pruned: Callable[[np.ndarray], object],
    make_images: Callable[[int], np.ndarray],
    batch_sizes: Sequence[int],
    *,
    warmup: int = 3,
    repeats: int = 20,
) -> tuple[LatencyRow, ...]:
    """Dense beside pruned, call by call in turn, so that a busy machine slows both alike.

    Args:
        dense, pruned: sessions, or functions that return only when their work is done.
        make_images: batch size -> the images that both are given.
        batch_sizes: one row each, in order.
        warmup: calls of each before the first measured one.
        repeats: calls of each that are measured, at least one.

    Raises:
        ZooError: if there is nothing to measure.
    """
    rows = []
    for batch in batch_sizes:
        images = make_images(batch)
        runs = (lambda x=images: dense(x), lambda x=images: pruned(x))
        slow, fast = (float(np.median(times)) for times in _interleaved(runs, warmup, repeats))
        rows.append(LatencyRow(batch, slow, fast, slow / fast))
    return tuple(rows)


def _interleaved(
    runs: Sequence[Callable[[], object]], warmup: int, repeats: int
) -> list[list[float]]:
    """Per function the milliseconds of `repeats` calls, taking turns."""
    if repeats < 1 or warmup < 0:
        raise ZooError(f"Latency needs repeats >= 1 and warmup >= 0, got {repeats} and {warmup}.")
    for _ in range(warmup):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            taken.append((time.perf_counter() - started) * 1e3)
    return times


def _open(path: Path, providers: Sequence[str] | None) -> Any:
    """A session on the providers asked for, or else on the best that loads."""
    ort = _onnxruntime()
    built = ort.get_available_providers()
    if providers:
        wanted = list(providers)
    elif _CUDA in built and torch.cuda.is_available():
        wanted = [_CUDA]
    else:
        wanted = [_CPU]
    for name in wanted:
        if name not in ort.get_all_providers():
            raise unknown("ONNX Runtime provider", name, built, ExportError)
    session = _accelerated(path, wanted) if wanted != [_CPU] else None
    if session is not None:
        return session
    try:
        session = ort.InferenceSession(path, _options(), providers=[_CPU])
    except Exception as error:  # its errors share no other base class
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"ONNX Runtime cannot load {path}: {reason}") from error
    if wanted == [_CPU]:
        return session
    if not providers:
        warnings.warn(
            f"ONNX Runtime cannot use the GPU here and runs on the CPU: {_CUDA} needs "
            f"{_NEEDS[_CUDA]}.",
            stacklevel=3,
        )
        return session
    usable = [name for name in built if name == _CPU or _accelerated(path, [name])]
    missing = [name for name in wanted if name not in usable] or wanted
    raise ExportError(
        f"{missing[0]} cannot be used here. Available: {', '.join(usable)}. It needs "
        f"{_NEEDS.get(missing[0], _OTHERWISE)}."
    )


def _accelerated(path: Path, providers: Sequence[str]) -> Any | None:
    """A session that runs on all of `providers`, or None; ONNX Runtime prints nothing about it."""
    ort = _onnxruntime()
    if not set(providers) <= set(ort.get_available_providers()):
        return None
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
        session = ort.InferenceSession(path, _options(), providers=providers, enable_fallback=0)
    except Exception:  # its errors share no other base class
        return None
    finally:
        ort.set_default_logger_severity(2)
    return session if set(providers) <= set(session.get_providers()) else None


def _options() -> Any:
    options = _onnxruntime().SessionOptions()
    options.log_severity_level = 3
    return options


def _onnxruntime() -> Any:
    """The onnxruntime module, imported without its warnings about graphics cards it cannot read."""
    if "onnxruntime" not in sys.modules:
        with _without_lines("device_discovery.cc"):
            import onnxruntime
    import onnxruntime

    return onnxruntime


@contextlib.contextmanager
def _without_lines(mark: str) -> Iterator[None]:
    """Drop the lines that hold `mark` from what native code writes to standard error."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as capture:
        os.dup2(capture.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            capture.seek(0)
            for line in capture:
                if mark.encode() not in line:
                    os.write(2, line)
