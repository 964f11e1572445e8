"""Files of networks of any input and any output: they compute what PyTorch does, at any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from odd import Net, conv
from odd_calls import CALLS, STRUCTURES, two_heads
from torch import Tensor, nn

import zoo
from zoo.errors import ExportError, ZooError
from zoo.tracing.calls import Inputs, call, leaves, mapped, tensors_of


def run(path: Path, inputs: Inputs) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    arrays = (tensor.numpy() for tensor in tensors_of(inputs))
    names = inputs if isinstance(inputs, dict) else [given.name for given in session.get_inputs()]
    return [*map(torch.from_numpy, session.run(None, dict(zip(names, arrays, strict=True))))]


def names(path: Path) -> tuple[list[str], list[str]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_pruned_network_knows_what_it_takes(name: str, precision: str, tmp_path: Path) -> None:
    build, inputs, _ = CALLS[name]
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    pruned = zoo.prune(build(), inputs, cf=1.2)
    result = zoo.export(pruned, tmp_path / "a.onnx", precision=precision)
    assert result.inputs == "noise"
    five = mapped(lambda t: torch.cat([t, t, t[:1]]), inputs)
    (expected,) = leaves(call(pruned, five))
    (got,) = run(tmp_path / "a.onnx", five)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < (1e-4 if precision == "fp32" else 2e-2)


STRUCTURE_NAMES = {
    "tuple": ["output_0", "output_1"],
    "nested list": ["output_0_0", "output_1_0", "output_1_1_0"],
    "dict": ["maps", "logits"],
    "ordered dict": ["logits", "maps"],
    "named tuple": ["maps", "logits"],
    "dataclass": ["maps", "more_all_0"],
    "dataclass with slots": ["maps", "more_all_0"],
    "beside no tensors": ["output_0", "output_4"],
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_outputs_have_the_names_they_stand_under(structure: str, tmp_path: Path) -> None:
    pruned = zoo.prune(two_heads(structure), torch.rand(2, 3, 8, 8), cf=2)
    images = torch.rand(5, 3, 8, 8)
    result = zoo.export(pruned, tmp_path / "a.onnx", inputs=images)
    assert names(tmp_path / "a.onnx") == (["pixel_values"], STRUCTURE_NAMES[structure])
    assert (result.top1_agreement, result.r2) == (1.0, pytest.approx(1.0))
    for got, expected in zip(run(tmp_path / "a.onnx", images), leaves(pruned(images)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class Namesakes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, image: Tensor) -> dict[str, Any]:
        maps = self.conv(image)
        sums = maps.sum((2, 3))
        return {"image": maps, "a": {"b": sums}, "a_b": sums * 2, "a_b_2": sums * 3}


def test_outputs_never_share_a_name_with_an_input_or_each_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, inputs = Namesakes().eval(), {"image": torch.rand(5, 3, 8, 8)}
    zoo.export(network, tmp_path / "a.onnx", inputs=inputs)
    expected = ["image_out", "a_b", "a_b_3", "a_b_2"]
    assert names(tmp_path / "a.onnx") == (["image"], expected)
    found = leaves(call(network, inputs))
    for got, own in zip(run(tmp_path / "a.onnx", inputs), found, strict=True):
        torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5)


def test_a_classifier_of_one_output_is_not_agreed_on_by_default(tmp_path: Path) -> None:
    """A constant would have the same top class: the scores themselves are compared."""
    torch.manual_seed(0)
    score = nn.Sequential(
        conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 1),
    ).eval()  # fmt: skip
    images = torch.rand(64, 3, 16, 16) * torch.linspace(0.2, 1, 64)[:, None, None, None]
    fine = zoo.export(score, tmp_path / "fine.onnx", inputs=images, precision="int8")
    assert fine.top1_agreement is None
    assert 0.97 <= fine.r2 <= 1
    with torch.no_grad():  # one channel that the next layer ignores takes the range of int8
        score[0].weight[0] = score[0].weight[0].abs() * 3e4
        score[2].weight[:, 0] = 0
    with pytest.raises(ExportError, match=r"share -?\d+\.\d% of the variance.*was not written"):
        zoo.export(score, tmp_path / "bad.onnx", inputs=images, precision="int8")
    assert not (tmp_path / "bad.onnx").exists()


def test_the_worst_of_several_heads_decides(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def forward(n: nn.Module, x: Tensor) -> dict[str, Tensor]:
        hidden = n.a(x).relu()
        return {"logits": n.head(hidden.mean((2, 3))), "depth": n.b(hidden)}

    module = Net(forward, a=conv(3, 8), b=conv(8, 1), head=nn.Linear(8, 4)).eval()
    images = torch.rand(64, 3, 8, 8)
    zoo.export(module, tmp_path / "fine.onnx", inputs=images, precision="int8")
    with torch.no_grad():
        module.a.weight[0] = module.a.weight[0].abs() * 3e4
        module.head.weight[:, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0])  # its classes stay clear
        module.b.weight[:, 0] = 0
    with pytest.raises(ExportError, match=r"agree on the top class of 100\.0%, and share"):
        zoo.export(module, tmp_path / "bad.onnx", inputs=images, precision="int8")


def test_oblong_images_stay_oblong(tmp_path: Path) -> None:
    x = torch.rand(1, 3, 4, 12)
    module = nn.Sequential(conv(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 48, 4))
    pruned = zoo.prune(module, x, cf=2)
    zoo.save(pruned, tmp_path / "saved")
    again = zoo.load_pruned(tmp_path / "saved", skeleton=module)
    for network in (pruned, again):
        zoo.export(network, tmp_path / "a.onnx")
        session = zoo.InferenceSession(tmp_path / "a.onnx")
        assert session.image_shape == (None, 3, 4, 12)
        assert session.metadata.image_shape == (3, 4, 12)
    (row,) = zoo.benchmark(
        module, pruned, options=zoo.BenchmarkOptions(batch_sizes=(1,), repeats=1, memory=False)
    )
    assert row.macs_ratio > 1.5
    assert "3x4x12" in (tmp_path / "saved" / "README.md").read_text()


def test_networks_of_several_inputs_are_not_timed(tmp_path: Path) -> None:
    del tmp_path
    build, inputs, _ = CALLS["tuple"]
    pruned = zoo.prune(build(), inputs, cf=1.2)
    with pytest.raises(ZooError, match="Networks of one input can be measured"):
        zoo.benchmark(build(), pruned)


def upsampled(times: int, mode: str = "nearest") -> nn.Module:
    layers = [nn.Upsample(scale_factor=1.35, mode=mode) for _ in range(times)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Conv2d(8, 2, 3))


class Extremes(nn.Module):
    """ONNX Runtime computes minima and maxima in fp32; these have both inputs in common."""

    def forward(self, images: Tensor) -> Tensor:
        other = images.flip(3) * 2
        return torch.maximum(images, other) + 3 * torch.minimum(images, other)


@pytest.mark.parametrize(
    "network", [upsampled(1), upsampled(2), upsampled(3, "bilinear"), Extremes()]
)
@pytest.mark.parametrize("half", [False, True])
def test_what_operators_take_in_fp32_does_not_hinder_fp16(
    network: nn.Module, half: bool, tmp_path: Path
) -> None:
    images = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    path, options = tmp_path / "a.onnx", zoo.ExportOptions(half_inputs=half)
    zoo.export(network, path, inputs=images, precision="fp16", options=options)
    (got,) = run(path, images.half() if half else images)
    assert (got - network(images)).abs().max() < 1e-2
    graph = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    scales = [constants[node.input[2]] for node in graph.node if node.op_type == "Resize"]
    for own in scales:  # 1.35 is no fp16 number
        assert onnx.numpy_helper.to_array(own)[3] == np.float32(1.35)
    assert {tensor.data_type for tensor in constants.values() if len(tensor.dims) == 4} <= {
        onnx.TensorProto.FLOAT16
    }


class Phased(nn.Module):
    """A convolution, scaled by the magnitudes of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 2)
        self.register_buffer("phase", torch.tensor([3 + 4j, 1j]))

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).mean((2, 3)) * self.phase.abs()


class Spectrum(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.fft.fft2(images)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Spectrum(), "gives complex numbers.*torch.view_as_real"),
        (Phased(), "phase is complex.*hold it as two real tensors"),
        (nn.Sequential(conv(3, 2)).to("meta"), "0.weight is on the meta device.*load the weights"),
        (nn.Sequential(conv(3, 2), nn.LazyConv2d(2, 1)), "1.weight has no shape yet: call the"),
        (nn.Sequential(nn.LazyBatchNorm2d()), "0.weight has no shape yet"),
    ],
)
def test_tensors_that_no_file_holds_are_named(
    network: nn.Module, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        zoo.export(network, tmp_path / "a.onnx", inputs=torch.rand(4, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []
