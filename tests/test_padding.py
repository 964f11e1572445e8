"""Channels of zeros, up to whole blocks: the same network, in widths that hardware likes."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import zoo
from zoo.deployment import ExportOptions
from zoo.errors import ZooError
from zoo.onnx_export import export
from zoo.padding import padded
from zoo.pruning.contract import randomised
from zoo.runtime import InferenceSession

CPU = "CPUExecutionProvider"


def pruned(arch: str, size: int, cf: float = 3.0, **options: object) -> nn.Module:
    dense = zoo.create_model(arch, 5, image_size=size)
    return zoo.load(arch, cf, dense, profile="equal", image_size=size, **options)  # type: ignore[arg-type]


def images(size: int, count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def conv_widths(path: Path) -> list[int]:
    file = onnx.load(path)
    return [item.dims[0] for item in file.graph.initializer if len(item.dims) == 4]


@pytest.mark.parametrize("multiple", [4, 16])
@pytest.mark.parametrize(
    "arch",
    [
        "cnet",  # a flattened map
        "resnet20-16",
        "resnet20",  # shortcuts padded with zeros by a constant of the forward pass
        "torchvision:mobilenet_v3_small",  # depthwise, squeeze and excitation
        "torchvision:densenet121",  # concatenations
        "timm:res2net50_14w_8s",  # splits by constants
        "timm:resnext26ts",  # grouped convolutions
    ],
)
def test_a_padded_network_computes_what_it_did_in_widths_of_whole_blocks(
    arch: str, multiple: int
) -> None:
    size = 32
    model = randomised(pruned(arch, size))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images(size).double()
    wide = padded(model, multiple)
    with torch.no_grad():
        expected, got = model(x), wide(x)
    assert (got - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    dense = zoo.create_model(arch, 5, image_size=size).state_dict()
    sizes = [round(len(kept) / model.pruning.plan.keep_ratios[name])
             for name, kept in model.pruning.plan.kept.items()]  # fmt: skip
    block = math.gcd(multiple, *sizes)
    odd = 0
    for name, tensor in wide.state_dict().items():
        if name.endswith("weight") and tensor.ndim == 4:
            width, before, whole = len(tensor), len(state[name]), len(dense[name])
            assert before <= width <= whole
            assert width == whole or width % block == 0
            odd += before % block > 0
    assert odd > 0


def test_a_file_is_padded_by_default_and_says_so(tmp_path: Path) -> None:
    model, x = pruned("resnet20-16", 16, cf=2.0), images(16, 40)
    files = {}
    for name, options in (
        ("default", None),
        ("own", ExportOptions(pad=1)),
        ("16", ExportOptions(pad=16)),
    ):
        path = tmp_path / f"{name}.onnx"
        result = export(model, path, inputs=x, options=options)
        session = InferenceSession(path, CPU)
        assert session.metadata.pad == result.pad == {"default": 8, "own": 1, "16": 16}[name]
        files[name] = session(x)
    with torch.no_grad():
        expected = model(x)
    for logits in files.values():
        assert torch.allclose(logits, expected, atol=1e-4)
    own, default, sixteen = (
        conv_widths(tmp_path / f"{name}.onnx") for name in ("own", "default", "16")
    )
    kept = sorted(set(model.pruning.plan.widths.values()))
    assert sorted(set(own)) == kept
    assert any(width % 8 for width in kept)
    assert sorted(default) == sorted(-(-width // 8) * 8 for width in own)
    assert sorted(sixteen) == sorted(-(-width // 16) * 16 for width in own)


def test_padding_follows_training_and_another_classifier(tmp_path: Path) -> None:
    model, x = pruned("resnet20-16", 16), images(16)
    model.fc = nn.Linear(model.fc.in_features, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        expected = model(x)
        got = padded(model, 8)(x)
    assert got.shape == (4, 7)
    assert torch.allclose(got, expected, atol=1e-5)
    result = export(model, tmp_path / "m.onnx", inputs=x, options=ExportOptions(pad=8))
    assert result.pad == 8


def test_what_cannot_be_padded_is_left_alone_by_default_and_refused_when_asked(
    tmp_path: Path,
) -> None:
    x = images(32)
    live = zoo.prune(zoo.create_model("resnet20-16", 5), x, cf=2)
    layer_norms = pruned("timm:convnext_atto", 32)
    cut_again = pruned("resnet20-16", 32)
    cut_again.conv1.weight = nn.Parameter(cut_again.conv1.weight[:3].detach())
    for model, reason in ((live, "align="), (layer_norms, "normalisation over channels")):
        assert export(model, tmp_path / "m.onnx", inputs=x).pad == 1
        with pytest.raises(ZooError, match=reason):
            export(model, tmp_path / "none.onnx", inputs=x, options=ExportOptions(pad=8))
    with pytest.raises(ZooError, match=r"conv1.weight has shape \(3, 3, 3, 3\).*cannot be padded"):
        padded(cut_again, 8)
    with pytest.raises(ZooError, match="pad must be an integer of at least 1, got 0"):
        export(live, tmp_path / "none.onnx", inputs=x, options=ExportOptions(pad=0))
    assert not (tmp_path / "none.onnx").exists()


def test_a_benchmark_pads_as_an_export_does_and_counts_the_macs_of_the_network(
    tmp_path: Path,
) -> None:
    dense = zoo.create_model("resnet20-16", 5)
    model = zoo.load("resnet20-16", 2, dense, profile="equal", image_size=16)
    rows = {}
    for pad in (None, 1):
        options = zoo.BenchmarkOptions(
            batch_sizes=(1,), repeats=1, warmup=0, memory=False, threads=1, pad=pad
        )
        (rows[pad],) = zoo.benchmark(dense, model, options=options)
        size = export(model, tmp_path / f"{pad}.onnx", options=ExportOptions(pad=pad)).bytes
        assert abs(rows[pad].pruned.bytes - size) < 200  # the metadata of noise are shorter
    assert rows[None].pruned.bytes > 1.05 * rows[1].pruned.bytes
    assert rows[None].macs_ratio == rows[1].macs_ratio > 1.9
    assert rows[None].dense.bytes == rows[1].dense.bytes
