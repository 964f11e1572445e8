"""Files in fp32, fp16 and int8 beside their modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from learnt import SAMPLE, logits, trained
from torch import Tensor, nn

import zoo.deployment.exporting
from zoo.deployment.exporting import export
from zoo.deployment.options import ExportOptions
from zoo.deployment.program import PRECISIONS, in_precision
from zoo.deployment.runtime import InferenceSession
from zoo.errors import ExportError, ZooError

CPU = "CPUExecutionProvider"

OLD = onnx.helper.make_model(onnx.helper.make_graph([], "old", [], [])).SerializeToString()


@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        pytest.param(
            arch, precision, marks=pytest.mark.slow if arch == "torchvision:mobilenet_v2" else ()
        )
        for arch in SAMPLE
        for precision in PRECISIONS
        if ":" not in arch or precision != "int8-symmetric"
    ],  # those of torchvision take seconds
)
def test_every_precision_agrees_with_pytorch_on_images_it_never_saw(
    arch: str, precision: str, tmp_path: Path
) -> None:
    model, splits = trained(arch)
    result = export(model, tmp_path / "m.onnx", inputs=splits.val, precision=precision)
    unseen = splits.test.subset(torch.arange(200))
    images = unseen.normalise(unseen.images)
    expected = logits(model, images)
    session = InferenceSession(tmp_path / "m.onnx", CPU)
    got = session(images)
    assert (got.argmax(1) == expected.argmax(1)).double().mean().item() >= 0.97
    assert result.top1_agreement >= (0.97 if precision.startswith("int8") else 0.99)
    step = slice(1, None, 2) if precision.startswith("int8") else slice(None)
    labels = splits.val.labels[step]
    compared = splits.val.normalise(splits.val.images[step])
    assert result.accuracy == (session(compared).argmax(1) == labels).double().mean()
    assert result.module_accuracy == (logits(model, compared).argmax(1) == labels).double().mean()
    assert result.module_accuracy > 0.6
    largest = max(1.0, expected.abs().max().item())
    bound = {"fp32": 1e-3, "fp16": 1e-2}.get(precision, 0.5 if arch == "cnet" else 0.25)
    close = (got - expected).abs().amax(1) / largest <= bound
    if not precision.startswith("int8"):
        assert close.all()
        return
    assert close.double().mean() >= 0.97  # the others exceed the ranges that int8 was given
    given = splits.val.normalise(splits.val.images[::2])
    expected = logits(model, given)
    assert (session(given) - expected).abs().max() <= bound * max(1.0, expected.abs().max().item())


class Loud(nn.Module):
    """Activations of up to a million between logits of about one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 6)
        self.conv1.weight.data *= 2e5
        self.conv2.weight.data /= 500
        self.fc.weight.data /= 100

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(images).relu()).mean((2, 3)))


def test_activations_beyond_fp16_are_an_error_though_the_cpu_computes_them(tmp_path: Path) -> None:
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    export(Loud(), tmp_path / "m.onnx", inputs=images)
    assert 65504 < Loud().conv1(images).max() < 2e6
    with pytest.raises(ExportError, match=r"cannot compute in fp16.*not finite"):
        export(Loud(), tmp_path / "half.onnx", inputs=images, precision="fp16")
    assert not (tmp_path / "half.onnx").exists()


def test_symmetric_int8_is_what_tensorrt_takes(tmp_path: Path) -> None:
    """No int32, no unsigned activations, and no zero point but zero."""
    model, splits = trained("cnet")
    export(model, tmp_path / "m.onnx", inputs=splits.val, precision="int8-symmetric")
    graph = onnx.load(tmp_path / "m.onnx").graph
    values = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    points = [node.input[2] for node in graph.node if node.op_type.endswith("uantizeLinear")]
    assert len(points) > 10
    for name in points:
        assert values[name].dtype == np.int8
        assert not values[name].any()


@pytest.mark.parametrize("precision", ["int8", "int8-symmetric"])
def test_no_sum_of_two_products_leaves_16_bits(precision: str, tmp_path: Path) -> None:
    """x86 CPUs without VNNI saturate there, and give other logits than those that have it."""
    model, splits = trained("cnet")
    export(model, tmp_path / "m.onnx", inputs=splits.val, precision=precision)
    graph = onnx.load(tmp_path / "m.onnx").graph
    kernels = [onnx.numpy_helper.to_array(item) for item in graph.initializer if len(item.dims) > 1]
    assert len(kernels) == 7
    for kernel in kernels:
        assert kernel.dtype == np.int8
        largest = np.abs(kernel.astype(int)).max()
        assert largest > 50
        assert 255 * 2 * largest <= np.iinfo(np.int16).max


def weight_types(path: Path) -> set[int]:
    file = onnx.load(path)
    return {item.data_type for item in file.graph.initializer if len(item.dims) == 4}


def test_the_weights_have_the_precision_and_the_file_says_so(tmp_path: Path) -> None:
    model, splits = trained("cnet")
    sizes = {}
    for precision, kind in (
        ("fp32", onnx.TensorProto.FLOAT),
        ("fp16", onnx.TensorProto.FLOAT16),
        ("int8", onnx.TensorProto.INT8),
    ):
        path = tmp_path / f"{precision}.onnx"
        result = export(model, path, inputs=splits.val, precision=precision)
        assert weight_types(path) == {kind}
        assert InferenceSession(path, CPU).metadata.precision == result.precision == precision
        sizes[precision] = result.bytes
    assert sizes["fp32"] > 1.5 * sizes["fp16"]
    assert sizes["fp16"] > sizes["int8"]


def test_int8_is_calibrated_on_other_images_than_it_is_compared_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, splits = trained("cnet")
    images = splits.val.normalise(splits.val.images)[:9]
    seen = {}

    def note(program: Any, precision: str, half_inputs: bool, calibration: Tensor) -> Any:
        seen["calibration"] = calibration
        return in_precision(program, precision, half_inputs, calibration)

    monkeypatch.setattr(zoo.deployment.exporting, "in_precision", note)
    options = ExportOptions(min_agreement=0)
    result = export(model, tmp_path / "m.onnx", inputs=images, precision="int8", options=options)
    assert torch.equal(seen["calibration"], images[::2])
    assert result.images == 4
    for none in ({"inputs": images[:1]}, {"example_input": images}):
        with pytest.raises(ExportError, match="int8 needs"):
            export(model, tmp_path / "none.onnx", precision="int8", **none)


def test_too_little_agreement_keeps_the_old_file_unless_less_is_asked(tmp_path: Path) -> None:
    model, splits = trained("cnet")
    images = splits.val.normalise(splits.val.images)
    calibrated_on_specks = images.clone()
    calibrated_on_specks[::2] *= 1e-3
    path = tmp_path / "m.onnx"
    path.write_bytes(OLD)
    with pytest.raises(ExportError, match=r"agree on the top class of .*; allowed are .*97.0%"):
        export(model, path, inputs=calibrated_on_specks, precision="int8")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [OLD]
    least = ExportOptions(min_agreement=0.0)
    result = export(model, path, inputs=calibrated_on_specks, precision="int8", options=least)
    assert result.top1_agreement < 0.97
    assert InferenceSession(path, CPU)(images).shape == (len(images), 6)
    with pytest.raises(ZooError, match="from 0 to 1, got 97"):
        ExportOptions(min_agreement=97)


class Blurred(nn.Module):
    """Blurs by a kernel that is no buffer, and sees where it looks: tensors that stay fp32."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.kernel = torch.full((3, 1, 3, 3), 1 / 9)
        self.conv, self.fc, self.scale = nn.Conv2d(4, 8, 3), nn.Linear(8, 5), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.conv2d(x, self.kernel, padding=1, groups=3)
        place = torch.linspace(-1, 1, x.shape[-1]).expand(x.shape[0], 1, x.shape[-2], -1)
        x = self.conv(torch.cat([x, place], 1)).relu().mean((2, 3)) * self.scale
        return self.fc(x / self.scale)


def test_a_network_with_tensors_that_are_no_buffers_is_written_in_fp16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 16, 16)
    result = export(Blurred().eval(), tmp_path / "b.onnx", inputs=images, precision="fp16")
    assert result.top1_agreement == 1
    with pytest.raises(ExportError, match=r"not finite|arithmetic in fp16"):
        export(Blurred(1e7).eval(), tmp_path / "c.onnx", inputs=images, precision="fp16")
