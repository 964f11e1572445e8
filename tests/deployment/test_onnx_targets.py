"""An export replaces ONNX files alone, and takes no other file's weights away."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
import zoo.deployment.files
from zoo.deployment.exporting import export
from zoo.errors import ExportError


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


def images() -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_what_is_no_onnx_file_is_never_overwritten(tmp_path: Path) -> None:
    model = zoo.load("resnet20-16", cf=2, weights="bundled:resnet20-16/cifar10")
    zoo.save(model, tmp_path / "pruned")
    torch.save(model.state_dict(), tmp_path / "base.pt")
    (tmp_path / "notes.onnx").write_text("my notes")
    files = [tmp_path / "pruned" / "model.safetensors", tmp_path / "pruned" / "pruning.json",
             tmp_path / "base.pt", tmp_path / "notes.onnx"]  # fmt: skip
    for path in files:
        before = path.read_bytes()
        with pytest.raises(ExportError, match=r"no ONNX file.* as \w+\.onnx, or remove it"):
            export(model, path)
        assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_an_onnx_file_of_any_name_and_an_empty_file_are_replaced(tmp_path: Path) -> None:
    for name in ("model.onnx", "exported"):
        path = tmp_path / name
        path.touch()
        for seed in (0, 1):
            export(network(seed), path, inputs=images())
            expected = network(seed)(images()).detach()
            got = zoo.InferenceSession(path, "CPUExecutionProvider")(images())
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_weights_that_a_copy_of_the_file_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo.deployment.files, "EXTERNAL_BYTES", 1000)
    path, copy = tmp_path / "model.onnx", tmp_path / "model_v1.onnx"
    for seed in range(2):
        export(network(seed), path, inputs=images())
        if seed == 0:
            shutil.copy(path, copy)
    for file, seed in ((copy, 0), (path, 1)):
        got = zoo.InferenceSession(file, "CPUExecutionProvider")(images())
        torch.testing.assert_close(got, network(seed)(images()).detach(), rtol=1e-3, atol=1e-4)
    copy.unlink()
    export(network(2), path, inputs=images())
    assert len(list(tmp_path.glob("*.data"))) == 1
