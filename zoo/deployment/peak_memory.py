"""Measure the peak memory of one ONNX file, in a process of its own that holds nothing else.

    python -m zoo.deployment.peak_memory FILE PROVIDER THREADS BATCH CHANNELS HEIGHT WIDTH

prints bytes. On the CPU it is the growth of the process (on Linux only); on a GPU, the decrease of
the device's free memory after the call.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["peak_memory"]

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(
    file: Path, provider: str, shape: tuple[int, ...], threads: int | None = None
) -> int | None:
    """Peak bytes of loading `file` and one call with images (N, C, H, W); None if unknown."""
    arguments = map(str, (file, provider, threads or 0, *shape))
    # -P: with -m alone, Python files of the working folder would be imported
    command = [sys.executable, "-P", "-m", "zoo.deployment.peak_memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def _on_cpu(file: str, threads: int, shape: tuple[int, ...]) -> int:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    images = np.zeros(shape, np.float32)
    RESET.write_text("5")  # resets the peak, which was that of the imports
    before = _kilobytes("VmRSS")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    kind = np.float16 if given.type == "tensor(float16)" else np.float32
    session.run(None, {given.name: images.astype(kind, copy=False)})
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(key: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def _on_gpu(file: str, provider: str, shape: tuple[int, ...]) -> int:
    import torch

    from zoo.deployment.runtime import InferenceSession

    images = torch.zeros(shape, device="cuda")
    before, _ = torch.cuda.mem_get_info()
    session = InferenceSession(file, provider)  # kept alive, because it owns the memory
    session(images)
    return before - torch.cuda.mem_get_info()[0]


if __name__ == "__main__":
    file, provider, *numbers = sys.argv[1:]
    threads, *shape = map(int, numbers)
    if provider == "CPUExecutionProvider":
        sys.stdout.write(str(_on_cpu(file, threads, tuple(shape))))
    else:
        sys.stdout.write(str(_on_gpu(file, provider, tuple(shape))))
