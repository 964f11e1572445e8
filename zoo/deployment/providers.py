"""Open ONNX Runtime sessions on the providers asked for, or on the best that works here."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.common.cache import cache_folder
from zoo.common.notices import warn
from zoo.common.quiet import quiet
from zoo.errors import ExportError, first_line, unknown

__all__ = ["CPU", "CUDA", "GPUS", "SHORT", "TENSORRT", "onnxruntime_module", "open_session"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
GPUS = (TENSORRT, CUDA)
"""In order of preference."""

SHORT = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
"""Short names."""

_NEEDS = {
    CUDA: "an NVIDIA GPU, its driver, and: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    TENSORRT: "an NVIDIA GPU, its driver, TensorRT's libraries on the library path, and: "
    "pip install 'onnxruntime-gpu[cuda,cudnn]'",
}
_OTHERWISE = "the ONNX Runtime package built for it: https://onnxruntime.ai/docs/install"


def open_session(
    path: Path,
    providers: Sequence[str] | None,
    threads: int | None,
    cuda_graph: bool,
    *,
    profile: Path | None = None,
) -> Any:
    """An onnxruntime.InferenceSession on all of `providers`, or by default on the best that loads.

    CUDA is added behind TensorRT, for the operators that TensorRT lacks. CUDA graphs are for the
    CUDA provider alone: TensorRT's do not distinguish image shapes. With `profile`, the operators'
    times are written to a file whose path begins like that.

    Raises:
        ExportError: if the file cannot be loaded, or a provider that was asked for cannot be used.
    """
    ort = onnxruntime_module()
    built = ort.get_available_providers()
    for name in providers or ():
        if name not in ort.get_all_providers():
            raise unknown("ONNX Runtime provider", name, built, ExportError)
    if providers and cuda_graph and set(providers) != {CUDA}:
        raise ExportError(f"CUDA graphs need {CUDA}, not {', '.join(providers)}.")
    likely = [name for name in built if name not in GPUS or torch.cuda.is_available()]
    failed, reason = "", ""
    for wanted in _choices(providers, cuda_graph, CUDA in likely):
        try:
            return _opened(path, wanted, threads, cuda_graph, profile)
        except Exception as error:  # its errors share no other base class
            failed = next((name for name in wanted if name not in likely), wanted[0])
            reason = first_line(error)
    try:
        session = _opened(path, [CPU], threads, False, profile)
    except Exception as error:
        raise ExportError(_unloadable(path, error)) from error
    if providers or cuda_graph:
        others = ", ".join(name for name in likely if name != failed)
        raise ExportError(
            f"{failed} cannot be used here: {reason.rstrip('.')}. Available: {others}. "
            f"It needs {_NEEDS.get(failed, _OTHERWISE)}."
        )
    if failed:
        warn(
            f"ONNX Runtime cannot use the GPU here and runs on the CPU: {CUDA} needs "
            f"{_NEEDS[CUDA]}. It says: {reason}"
        )
    return session


def _choices(
    providers: Sequence[str] | None, cuda_graph: bool, gpu: bool
) -> tuple[Sequence[str], ...]:
    """The lists of providers to try before the CPU, in order; one list shares the operators."""
    if providers:
        wanted = list(providers)
        if TENSORRT in wanted and CUDA not in wanted:
            wanted.insert(wanted.index(TENSORRT) + 1, CUDA)
        return (wanted,)
    if cuda_graph:
        return ([CUDA],)
    return ([TENSORRT, CUDA], [CUDA]) if gpu else ()


def _unloadable(path: Path, error: Exception) -> str:
    reason = first_line(error)
    version = onnxruntime_module().__version__
    newer = "opset" in reason.lower() or "IR version" in reason
    advice = (
        f" The file is newer than onnxruntime {version}: upgrade that, or export the file again."
        if newer
        else ""
    )
    return f"ONNX Runtime cannot load {path}: {reason}{advice}"


def _opened(
    path: Path,
    providers: Sequence[str],
    threads: int | None,
    cuda_graph: bool,
    profile: Path | None,
) -> Any:
    """A session on all of `providers`.

    Raises:
        Exception: whatever ONNX Runtime raises, or RuntimeError if it leaves out a provider.
    """
    ort = onnxruntime_module()
    if not set(providers) <= set(ort.get_available_providers()):
        raise RuntimeError("this onnxruntime is built without it")
    with contextlib.nullcontext() if list(providers) == [CPU] else _accelerating():
        session = ort.InferenceSession(
            path,
            _options(threads, profile),
            providers=[(name, _provider_options(name, path, cuda_graph)) for name in providers],
            enable_fallback=0,
        )
    if not set(providers) <= set(session.get_providers()):
        raise RuntimeError("ONNX Runtime does not load it")
    return session


@contextlib.contextmanager
def _accelerating() -> Iterator[None]:
    """Load the CUDA libraries that torch came with, and keep ONNX Runtime silent about failures."""
    ort = onnxruntime_module()
    ort.set_default_logger_severity(4)
    try:
        with quiet():
            ort.preload_dlls()
        yield
    finally:
        ort.set_default_logger_severity(2)  # the default; the old value cannot be read


def _provider_options(name: str, path: Path, cuda_graph: bool) -> dict[str, str]:
    device = {"device_id": str(torch.cuda.current_device())} if torch.cuda.is_available() else {}
    if name == CUDA:
        # fp32 means fp32, not the 10 bits of TF32
        return device | {"use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))}
    if name != TENSORRT:
        return {}
    import onnx

    weights = onnx.load(path, load_external_data=False).graph.initializer
    types = {item.data_type for item in weights}
    cache = cache_folder() / "tensorrt" / _digest(path, weights)
    cache.mkdir(parents=True, exist_ok=True)
    return device | {
        "trt_engine_cache_enable": "1",  # an engine takes a minute or more to build
        "trt_engine_cache_path": str(cache),
        "trt_fp16_enable": str(int(onnx.TensorProto.FLOAT16 in types)),
        "trt_int8_enable": str(int(onnx.TensorProto.INT8 in types)),
    }


def _digest(path: Path, weights: Iterable[Any]) -> str:
    """Digest of a file and its external weights; TensorRT's engine cache does not check them."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    beside = {ExternalDataInfo(item).location for item in weights if uses_external_data(item)}
    state = hashlib.sha256()
    for part in (path, *(path.parent / name for name in sorted(beside))):
        with part.open("rb") as file:
            state.update(hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()[:24]


def _options(threads: int | None, profile: Path | None) -> Any:
    options = onnxruntime_module().SessionOptions()
    options.log_severity_level = 4  # errors are raised, and need not be logged too
    # threads of an idle session would keep spinning, and slow down other sessions
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def onnxruntime_module() -> Any:
    """The onnxruntime module, imported without its warnings about GPUs that it cannot read."""
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
