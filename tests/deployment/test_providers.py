"""Providers: which of them a session runs on, and what it says when it cannot."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import CPU, noise
from learnt import trained
from torch import nn

from zoo.deployment import providers as onnx_providers
from zoo.deployment.exporting import export
from zoo.deployment.runtime import InferenceSession
from zoo.errors import ExportError, ZooError


def test_a_provider_that_fails_at_run_time_is_one_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A reshape that only even batches survive."""
    tensors = onnx.TensorProto
    images = onnx.helper.make_tensor_value_info("images", tensors.FLOAT, ["batch", 3, 8, 8])
    logits = onnx.helper.make_tensor_value_info("logits", tensors.FLOAT, ["pairs", 384])
    shape = onnx.helper.make_tensor("shape", tensors.INT64, [2], [-1, 384])
    node = onnx.helper.make_node("Reshape", ["images", "shape"], ["logits"])
    graph = onnx.helper.make_graph([node], "pairs", [images], [logits], [shape])
    opset = [onnx.helper.make_opsetid("", 18)]
    path = tmp_path / "pairs.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    session = InferenceSession(path, CPU)
    assert session(noise(4)).shape == (2, 384)
    with pytest.raises(
        ExportError, match=r"CPUExecutionProvider failed on 3 images in pairs\.onnx"
    ):
        session(noise(3))
    assert capfd.readouterr() == ("", "")


def test_cuda_graphs_need_cuda(small_file: Path) -> None:
    for providers in (CPU, onnx_providers.TENSORRT, [onnx_providers.TENSORRT, onnx_providers.CUDA]):
        with pytest.raises(ExportError, match="CUDA graphs need CUDAExecutionProvider, not "):
            InferenceSession(small_file, providers, cuda_graph=True)
    if not torch.cuda.is_available():
        with pytest.raises(ExportError, match="CUDAExecutionProvider cannot be used here"):
            InferenceSession(small_file, cuda_graph=True)


class Machine:
    """An ONNX Runtime with providers of which some work; the others fail, or are left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: dict[str, str | None]) -> None:
        machine, self.tried = self, []

        class Session:
            def __init__(self, *_: Any, providers: list[tuple[str, dict]], **__: Any) -> None:
                self.names = [name for name, _ in providers]
                machine.tried.append(self.names)
                for name in self.names:
                    if failures.get(name):
                        raise RuntimeError(failures[name])

            def get_providers(self) -> list[str]:
                return [*(name for name in self.names if name not in failures), CPU]

        ort = onnx_providers.onnxruntime_module()
        built = [onnx_providers.TENSORRT, onnx_providers.CUDA, CPU]
        monkeypatch.setattr(ort, "InferenceSession", Session)
        monkeypatch.setattr(ort, "get_available_providers", lambda: built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_tensorrt_comes_before_cuda_and_cuda_behind_it(
    small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, cuda = onnx_providers.TENSORRT, onnx_providers.CUDA
    machine = Machine(monkeypatch, {})
    for asked, names in (
        (None, [tensorrt, cuda]),
        ([tensorrt], [tensorrt, cuda]),
        ([cuda], [cuda]),
        ([tensorrt, CPU], [tensorrt, cuda, CPU]),
    ):
        assert onnx_providers.open_session(small_file, asked, None, False).names == names
    assert onnx_providers.open_session(small_file, None, None, True).names == [cuda]
    assert len(machine.tried) == 5
    machine = Machine(monkeypatch, {tensorrt: None})
    assert onnx_providers.open_session(small_file, None, None, False).names == [cuda]
    assert machine.tried == [[tensorrt, cuda], [cuda]]


def test_the_reason_of_a_failure_is_quoted(
    small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, cuda = onnx_providers.TENSORRT, onnx_providers.CUDA
    Machine(monkeypatch, {cuda: "Failed to allocate 9 bytes.\nat line 8"})
    for options in ({"providers": [cuda]}, {"cuda_graph": True}):
        asked = {"providers": None, "threads": None, "cuda_graph": False} | options
        with pytest.raises(ExportError, match=r"here: Failed to allocate 9 bytes\. Av") as caught:
            onnx_providers.open_session(small_file, **asked)
        assert f"Available: {tensorrt}, {CPU}. " in str(caught.value)
        assert "line 8" not in str(caught.value)
    with pytest.warns(UserWarning, match="runs on the CPU.*It says: Failed to allocate 9 bytes"):
        assert onnx_providers.open_session(small_file, None, None, False).names == [CPU]


def test_tensorrts_engines_are_kept_by_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own names for them tell the file's name and its graph, and no weights."""
    model, splits = trained("cnet")

    def engines(path: Path) -> str:
        options = onnx_providers._provider_options(onnx_providers.TENSORRT, path, False)
        return options["trt_engine_cache_path"]

    path = tmp_path / "m.onnx"
    for external in (1 << 30, 1000):
        monkeypatch.setattr("zoo.deployment.files.EXTERNAL_BYTES", external)
        export(model, path, inputs=splits.val)
        first = engines(path)
        assert Path(first).is_dir()
        assert engines(path) == first
        export(tuned(model), path, inputs=splits.val)
        assert engines(path) != first
    (weights,) = tmp_path.glob("*.data")
    second = engines(path)
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    assert engines(path) != second


def tuned(model: nn.Module) -> nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    other.fc.weight.data.mul_(1.5)
    return other


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CPUExecutionProvdier", "Did you mean 'CPUExecutionProvider'"),
        ("DmlExecutionProvider", "cannot be used here.*Available: .*CPUExecutionProvider.*needs"),
    ],
)
def test_an_absent_provider_is_an_error_that_names_those_present(
    name: str, message: str, small_file: Path
) -> None:
    with pytest.raises(ZooError, match=message):
        InferenceSession(small_file, [name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_gpu_provider_without_a_gpu_is_one_error_and_no_chatter(
    name: str, small_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=f"{name} cannot be used here") as caught:
        InferenceSession(small_file, [name, "CPUExecutionProvider"])
    assert "Available: CPUExecutionProvider." in str(caught.value)
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_onnx_runtime_cannot_use_falls_back_with_a_warning(
    small_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if "CUDAExecutionProvider" not in onnx_providers.onnxruntime_module().get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.warns(UserWarning, match="runs on the CPU: CUDAExecutionProvider needs") as caught:
        session = InferenceSession(small_file)
    assert "ONNX Runtime does not load it" in str(caught[0].message)
    assert session.providers == ("CPUExecutionProvider",)
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_computes(small_file: Path) -> None:
    session = InferenceSession(small_file, ["CUDAExecutionProvider"])
    assert session.providers[0] == "CUDAExecutionProvider"
    images = noise(4)
    expected = InferenceSession(small_file, CPU)(images)
    got = session(images.cuda())
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-2, atol=1e-2)
    again = session(noise(9).cuda())
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-2, atol=1e-2)
    assert again.shape == (9, 6)
    np.testing.assert_allclose(session(images.numpy()), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_cuda_graph_replays_for_every_shape_and_its_own_images(small_file: Path) -> None:
    session = InferenceSession(small_file, "CUDAExecutionProvider", cuda_graph=True)
    plain = InferenceSession(small_file, CPU)
    images = noise(60)
    start = 0
    for count in (4, 9, 4, 9, 4, 4):
        part = images[start : start + count]
        start += count
        torch.testing.assert_close(session(part.cuda()).cpu(), plain(part), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_threads_share_a_gpu_session(small_file: Path) -> None:
    session = InferenceSession(small_file, "CUDAExecutionProvider")
    plain = InferenceSession(small_file, CPU)
    images = noise(64 * 32).split(64)
    expected = [plain(part) for part in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, right in zip(pool.map(session, images), expected, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_closed_session_is_gone_at_once(small_file: Path) -> None:
    """With its memory, and no collector's help."""
    gc.disable()
    try:
        session = InferenceSession(small_file, "CUDAExecutionProvider")
        session(noise(4).cuda())
        inner = weakref.ref(session._session)
        del session
        assert inner() is None
    finally:
        gc.enable()


def test_only_device_discovery_lines_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with onnx_providers._without_lines("device_discovery.cc"):
        os.write(2, b"2026 [W:onnxruntime:Default, device_discovery.cc:164] card0/device/vendor\n")
        os.write(2, b"something that matters\n")
    os.write(2, b"and afterwards\n")
    assert capfd.readouterr().err == "something that matters\nand afterwards\n"
