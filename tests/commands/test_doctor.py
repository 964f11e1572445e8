"""`zoo doctor` tells what is there, what is missing and for what, whatever is broken."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import onnxruntime
import pytest
import torch

import zoo
from zoo.cli import main

RUN = {"capture_output": True, "text": True, "check": True}


def test_versions_and_providers_are_those_of_this_machine(capsys) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in ("torch", "timm", "onnx", "safetensors"):
        assert f"{name} {importlib.metadata.version(name)}" in shown
    assert f"{onnxruntime.__version__} at " in shown
    assert "CPUExecutionProvider: works" in shown
    assert f"PyTorch uses {torch.backends.cpu.get_cpu_capability()}" in shown
    assert f"{len(zoo.list_profiles())} bundled profiles" in shown
    assert "the learned policy, trained for" in shown
    assert ("none that PyTorch can use" in shown) == (not torch.cuda.is_available())


@pytest.mark.parametrize(
    ("package", "version", "code", "line"),
    [
        ("timm", None, 1, "MISSING, needed by every command (timm)"),
        ("pymoo", None, 0, "needed by zoo search, zoo ledger of merged ledgers: pip install"),
        ("timm", "0.9.2", 0, "timm 0.9.2 is not >=1.0.15"),
    ],
)
def test_what_is_missing_or_too_old_is_said_with_what_needs_it(
    package: str, version: str | None, code: int, line: str, monkeypatch, capsys
) -> None:
    version_of = importlib.metadata.version

    def version_here(name: str) -> str:
        if name != package:
            return version_of(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", version_here)
    assert main(["doctor"]) == code
    assert line in capsys.readouterr().out


def test_what_is_broken_does_not_hide_the_rest(monkeypatch, capsys) -> None:
    def broken() -> None:
        raise ImportError("libsomething.so is missing\nand more")

    monkeypatch.setattr(torch, "get_num_threads", broken)
    monkeypatch.setattr("zoo.deployment.providers.onnxruntime_module", broken)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("  ImportError: libsomething.so is missing\n") == 2
    assert "bundled profiles" in shown


def test_the_version_is_the_distributions_and_waits_for_nothing_heavy() -> None:
    code = (
        "import sys; from zoo.cli import main; main(['--version']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], **RUN)
    assert done.stdout == f"zoo {importlib.metadata.version('prunezoo')}\nFalse\n"
    assert zoo.__version__ == importlib.metadata.version("prunezoo")
