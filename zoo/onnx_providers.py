"""Sessions of ONNX Runtime on the providers asked for, or else on the best that works here."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.data import cache_folder
from zoo.errors import ExportError, unknown

__all__ = ["CPU", "CUDA", "GPUS", "TENSORRT", "onnxruntime_module", "open_session"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
GPUS = (TENSORRT, CUDA)
"""In order of preference."""

_NEEDS = {
    CUDA: "an NVIDIA GPU, its driver, and: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    TENSORRT: "an NVIDIA GPU, its driver, TensorRT's libraries on the library path, and: "
    "pip install 'onnxruntime-gpu[cuda,cudnn]'",
}
_OTHERWISE = "the ONNX Runtime package built for it: https://onnxruntime.ai/docs/install"


def open_session(
    path: Path, providers: Sequence[str] | None, threads: int | None, cuda_graph: bool
) -> Any:
    """An onnxruntime.InferenceSession on all of `providers`, or else on the best that loads.

    Raises:
        ExportError: if the file cannot be loaded, or a provider that was asked for not be used.
    """
    ort = onnxruntime_module()
    built = ort.get_available_providers()
    for name in providers or ():
        if name not in ort.get_all_providers():
            raise unknown("ONNX Runtime provider", name, built, ExportError)
    if providers and not set(providers) & set(GPUS) and cuda_graph:
        raise ExportError(f"CUDA graphs need {' or '.join(GPUS)}, not {', '.join(providers)}.")
    gpu = torch.cuda.is_available() and CUDA in built
    choices = [list(providers)] if providers else [[TENSORRT, CUDA], [CUDA]] if gpu else [[CPU]]
    for wanted in choices:
        if wanted != [CPU]:
            session = _accelerated(path, wanted, threads, cuda_graph)
            if session is not None:
                return session
    try:
        session = ort.InferenceSession(path, _options(threads), providers=[CPU], enable_fallback=0)
    except Exception as error:  # its errors share no other base class
        raise ExportError(_unloadable(path, error)) from error
    if choices == [[CPU]] and not cuda_graph:
        return session
    if providers or cuda_graph:
        wanted = list(providers or [CUDA])
        usable = [n for n in built if n == CPU or _accelerated(path, [n], threads, False)]
        missing = [name for name in wanted if name not in usable]
        if cuda_graph and not missing:
            raise ExportError(
                f"{wanted[0]} cannot record CUDA graphs of {path.name}: some of its operators run "
                f"on the CPU. Leave cuda_graph out."
            )
        missing = missing or wanted
        raise ExportError(
            f"{missing[0]} cannot be used here. Available: {', '.join(usable)}. It needs "
            f"{_NEEDS.get(missing[0], _OTHERWISE)}."
        )
    warnings.warn(
        f"ONNX Runtime cannot use the GPU here and runs on the CPU: {CUDA} needs {_NEEDS[CUDA]}.",
        stacklevel=3,
    )
    return session


def _unloadable(path: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    version = onnxruntime_module().__version__
    newer = "opset" in reason.lower() or "IR version" in reason
    advice = (
        f" The file is newer than onnxruntime {version}: upgrade that, or export the file again."
        if newer
        else ""
    )
    return f"ONNX Runtime cannot load {path}: {reason}{advice}"


def _accelerated(
    path: Path, providers: Sequence[str], threads: int | None, cuda_graph: bool
) -> Any | None:
    """A session that runs on all of `providers`, or None; ONNX Runtime prints nothing about it."""
    ort = onnxruntime_module()
    if not set(providers) <= set(ort.get_available_providers()):
        return None
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()  # the CUDA libraries that torch came with
        session = ort.InferenceSession(
            path,
            _options(threads),
            providers=[(name, _provider_options(name, path, cuda_graph)) for name in providers],
            enable_fallback=0,
        )
    except Exception:  # its errors share no other base class
        return None
    finally:
        ort.set_default_logger_severity(2)
    return session if set(providers) <= set(session.get_providers()) else None


def _provider_options(name: str, path: Path, cuda_graph: bool) -> dict[str, str]:
    device = {"device_id": str(torch.cuda.current_device())} if torch.cuda.is_available() else {}
    if name == CUDA:
        return device | ({"enable_cuda_graph": "1"} if cuda_graph else {})
    if name != TENSORRT:
        return {}
    import onnx

    types = {item.data_type for item in onnx.load(path, load_external_data=False).graph.initializer}
    cache = cache_folder() / "tensorrt"
    cache.mkdir(parents=True, exist_ok=True)
    return device | {
        "trt_engine_cache_enable": "1",  # an engine takes a minute or more to build
        "trt_engine_cache_path": str(cache),
        "trt_fp16_enable": str(int(onnx.TensorProto.FLOAT16 in types)),
        "trt_int8_enable": str(int(onnx.TensorProto.INT8 in types)),
        "trt_cuda_graph_enable": str(int(cuda_graph)),
    }


def _options(threads: int | None) -> Any:
    options = onnxruntime_module().SessionOptions()
    options.log_severity_level = 4  # what fails is raised, once
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def onnxruntime_module() -> Any:
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
