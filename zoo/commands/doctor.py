"""`zoo doctor`: what every bug report should say about the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import first_line

__all__ = ["DoctorCommand", "doctor"]

DISTRIBUTION = "prunezoo"

EXTRAS = {
    "search": "zoo search, zoo ledger of merged ledgers",
    "cluster": "zoo search --cluster",
    "plots": "zoo ledger --plot, the plots of a search's report",
    "hf": "--data hf:...",
    "digits": "--data digits, make quickstart",
}
"""Optional dependencies -> what needs them."""

INSTRUCTIONS = (
    *("sse4_2", "avx2", "fma3", "avx_vnni", "avx512_f", "avx512_vnni", "avx512_bf16"),
    *("amx_bf16", "amx_int8", "neon", "bf16", "sve", "i8mm"),
)
"""Instruction sets that decide which kernels run, by the names of torch.cpu.get_capabilities()."""

VARIABLES = (
    *("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("ZOO_CACHE", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
)
"""Environment variables that change what the zoo does."""


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Print versions, processor, GPU, ONNX Runtime's providers, cache, and missing packages.

    Paste the whole output into a bug report. The exit code is 1 if a package that every command
    needs is missing.
    """


def doctor(_: DoctorCommand) -> int:
    missing = 0
    for topic, lines in (
        ("machine", _machine()),
        ("processor", _processor()),
        ("GPU", _gpu()),
        ("ONNX Runtime", _onnxruntime()),
        ("zoo", _zoo()),
        ("packages", _packages()),
    ):
        print(topic)
        try:
            for line in lines:
                missing += line.startswith("MISSING")
                print(f"  {line}")
        except Exception as error:  # a broken package must not hide the other topics
            print(f"  {type(error).__name__}: {first_line(error)}")
    return int(missing > 0)


def _machine() -> Iterator[str]:
    yield f"{platform.platform()}, Python {platform.python_version()} at {sys.executable}"
    for name in VARIABLES:
        if name in os.environ:
            yield f"{name}={os.environ[name]}"


def _processor() -> Iterator[str]:
    import torch

    from zoo.planning.latency import device_name

    yield f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = " ".join(name for name in INSTRUCTIONS if has.get(name)) or "not known"
    yield f"instruction sets: {names}; PyTorch uses {torch.backends.cpu.get_cpu_capability()}"


def _gpu() -> Iterator[str]:
    import torch

    built = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        yield f"none that PyTorch can use (built for {f'CUDA {built}' if built else 'CPUs'})"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        yield f"{device.name}, {memory}, compute capability {device.major}.{device.minor}"
    yield f"CUDA {built}, cuDNN {torch.backends.cudnn.version()}"


def _onnxruntime() -> Iterator[str]:
    """Each execution provider, and whether a small network runs on it."""
    import onnx
    from onnx import TensorProto, helper

    from zoo.deployment.providers import CPU, GPUS, onnxruntime_module, open_session

    ort = onnxruntime_module()
    yield f"{ort.__version__} at {Path(ort.__file__).parent}"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    versions = {"opset_imports": [helper.make_opsetid("", 17)], "ir_version": 8}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "relu.onnx"
        onnx.save(helper.make_model(graph, **versions), path)
        for provider in ort.get_available_providers():
            if provider in (CPU, *GPUS):
                try:
                    open_session(path, [provider], None, False)
                    yield f"{provider}: works"
                except Exception as error:
                    yield first_line(error)


def _zoo() -> Iterator[str]:
    import zoo
    from zoo.common.cache import cache_folder
    from zoo.planning.learned import learned_policy

    yield f"{zoo.__version__} at {Path(zoo.__file__).parent}"
    yield f"{len(zoo.list_profiles())} bundled profiles"
    episodes = learned_policy().training.episodes
    yield f"the learned policy, trained for {episodes:,} episodes"
    folder = cache_folder()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    writable = "writable" if os.access(nearest, os.W_OK) else "NOT writable"
    yield f"cache {folder}: {size / 2**20:.1f} MiB, {writable}"


def _packages() -> Iterator[str]:
    """Every dependency: its version, or that it is out of range or missing, and what needs it."""
    from packaging.requirements import Requirement

    installed = []
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            extra, label = "", "MISSING, needed by every command"
        else:
            found = (name for name in EXTRAS if marker.evaluate({"extra": name}))
            extra = next(found, "")
            if not extra:
                continue
            install = f"pip install '{DISTRIBUTION}[{extra}]'"
            label = f"missing, needed by {EXTRAS[extra]}: {install}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{label} ({requirement.name})"
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        if fits:
            installed.append(f"{requirement.name} {version}")
        else:
            yield f"{requirement.name} {version} is not {requirement.specifier}"
    yield ", ".join(installed)
