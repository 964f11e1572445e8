"""Channels of zeros, up to whole blocks: the same network, in widths that hardware likes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from helpers import macs_of
from torch import nn

import zoo
from zoo.deployment import padding
from zoo.deployment.exporting import export
from zoo.deployment.options import ExportOptions
from zoo.deployment.padding import padded
from zoo.deployment.runtime import InferenceSession
from zoo.errors import ZooError
from zoo.spec.groups import Group, Slot
from zoo.tracing.contract import randomised

CPU = "CPUExecutionProvider"


def pruned(arch: str, size: int, cf: float = 3.0, **options: object) -> nn.Module:
    dense = zoo.create_model(arch, 5, image_size=size)
    return zoo.load(arch, cf, dense, profile="equal", image_size=size, **options)  # type: ignore[arg-type]


def images(size: int, count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def conv_widths(path: Path) -> list[int]:
    file = onnx.load(path)
    return [item.dims[0] for item in file.graph.initializer if len(item.dims) == 4]


OF_SEVERAL_GROUPS = {
    "resnet20", "timm:res2net50_14w_8s", "timm:resnext26ts", "timm:regnety_002",
}  # fmt: skip
"""Whose layers have channels of several groups, or of grouped convolutions."""


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
        "timm:regnety_002",  # more of them, of eight channels per group
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
    sizes = [
        round(len(kept) / model.pruning.plan.keep_ratios[name])
        for name, kept in model.pruning.plan.kept.items()
    ]
    block = math.gcd(multiple, *sizes)
    grown = 0
    for name, tensor in wide.state_dict().items():
        if name.endswith("weight") and tensor.ndim == 4:
            width, before, whole = len(tensor), len(state[name]), len(dense[name])
            assert before <= width <= whole
            grown += width > before
            if arch not in OF_SEVERAL_GROUPS:
                assert width - before < multiple
                assert width == whole or width % block == 0
    assert grown > 0


def group(size: int, *slots: Slot) -> Group:
    return Group("conv", size, slots, filters=("conv.weight",))


@pytest.mark.parametrize(
    ("own", "kept", "multiple", "width"),
    [
        (group(64, Slot("conv.weight", 0)), 23, 8, 24),
        (group(64, Slot("conv.weight", 0)), 24, 8, 24),
        (group(20, Slot("conv.weight", 0)), 17, 8, 20),  # no more than there were
        (group(64, Slot("conv.weight", 0), Slot("fc.weight", 1, block=4)), 23, 8, 24),
        # a grouped convolution, whose units have a channel in each of four parts
        (group(64, *(Slot("conv.weight", 0, 64 * n) for n in range(4))), 23, 8, 24),
        (group(64, *(Slot("conv.weight", 0, 64 * n) for n in range(4))), 25, 8, 26),
        (group(8, *(Slot("conv.weight", 0, 8 * n) for n in range(4))), 7, 16, 7),  # not the dense
    ],
)
def test_a_group_is_filled_up_to_whole_blocks_of_channels(
    own: Group, kept: int, multiple: int, width: int
) -> None:
    filled = padding._filled(own, tuple(range(1, kept + 1)), multiple)
    assert len(filled) == width
    assert set(range(1, kept + 1)) <= set(filled) <= set(range(own.size))
    assert list(filled) == sorted(set(filled))


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


@pytest.mark.slow
def test_what_cannot_be_padded_is_left_alone_by_default_and_refused_when_asked(
    tmp_path: Path,
) -> None:
    x = images(32)
    live = zoo.prune(zoo.create_model("resnet20-16", 5), x, cf=2)
    layer_norms = pruned("timm:convnext_atto", 32)
    cut_again = pruned("resnet20-16", 32)
    cut_again.conv1.weight = nn.Parameter(cut_again.conv1.weight[:3].detach())
    for model, reason in ((live, "align="), (layer_norms, "normalisation over channels")):
        result = export(model, tmp_path / "m.onnx", inputs=x)
        assert result.pad == 1
        assert re.search(reason, result.unpadded)
        with pytest.raises(ZooError, match=reason):
            export(model, tmp_path / "none.onnx", inputs=x, options=ExportOptions(pad=8))
    with pytest.raises(ZooError, match=r"cannot be padded: conv1.weight has shape \(3, 3, 3, 3\)"):
        padded(cut_again, 8)
    with pytest.raises(ZooError, match="pad must be an integer of at least 1, got 0"):
        export(live, tmp_path / "none.onnx", inputs=x, options=ExportOptions(pad=0))
    assert not (tmp_path / "none.onnx").exists()


@pytest.mark.slow
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


def test_grouped_convolutions_are_not_made_dense_again() -> None:
    """A unit of theirs has a channel of every part: eight units would be all of them."""
    model = pruned("timm:regnety_002", 64, cf=2.0, metric="macs")

    assert macs_of(padded(model, 8), 64) < 1.15 * macs_of(model, 64)


def test_layers_of_one_channel_keep_their_kind() -> None:
    """Of one channel a depthwise convolution looks like any other, and a grouped one depthwise."""
    name = "features.3.conv.0.0"
    dense = zoo.create_model("torchvision:mobilenet_v2", 5)
    thin = zoo.load("torchvision:mobilenet_v2", 1.5, dense, profile="equal", image_size=32,
                    keep={name: 1e-9})  # fmt: skip
    grouped = zoo.load("timm:resnext26ts", 8, zoo.create_model("timm:resnext26ts", 5),
                       profile="equal", image_size=32)  # fmt: skip
    assert thin.pruning.plan.widths[name] == 1
    for model in (thin, grouped):
        model, x = randomised(model), images(32).double()
        with torch.no_grad():
            expected, got = model(x), padded(model, 8)(x)
        assert (got - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_channel_attention_is_not_padded_though_little_changes(tmp_path: Path) -> None:
    """Zeros between the channels that it convolves over change a logit by about a thousandth."""
    model = randomised(pruned("timm:ecaresnet26t", 32, cf=4.0)).float()
    result = export(model, tmp_path / "m.onnx", inputs=images(32))
    assert (result.pad, result.relative_difference < 1e-4) == (1, True)
    assert "depends on the number of channels" in result.unpadded


def test_records_that_do_not_belong_and_lost_tensors_are_refused() -> None:
    model = pruned("resnet20-16", 16)
    plan = model.pruning.plan
    for kept in ({**plan.kept, "conv1": (0, 99)}, {"other": (0,)}):
        model.pruning = replace(model.pruning, plan=replace(plan, kept=kept))
        with pytest.raises(ZooError, match="other channel groups"):
            padded(model, 8)
    wrapped = nn.Sequential(pruned("resnet20-16", 16))
    wrapped.pruning = wrapped[0].pruning
    with pytest.raises(ZooError, match=r"has no .* any more"):
        padded(wrapped, 8)


def test_widths_of_whole_blocks_are_not_said_to_be_padded(tmp_path: Path) -> None:
    model = pruned("resnet20-16", 16, cf=2.0, align=16)
    result = export(model, tmp_path / "m.onnx")
    assert (result.pad, result.unpadded) == (1, "")


@pytest.mark.parametrize("wrapper", [torch.compile, nn.DataParallel])
def test_of_a_wrapped_network_the_one_inside_is_exported(wrapper: Any, tmp_path: Path) -> None:
    model = pruned("resnet20-16", 16)
    plain = export(model, tmp_path / "plain.onnx")
    result = export(wrapper(model), tmp_path / "wrapped.onnx")
    assert (result.pad, result.unpadded, result.bytes) == (plain.pad, "", plain.bytes)
    plain_facts, facts = (
        InferenceSession(tmp_path / f"{name}.onnx", CPU).metadata for name in ("plain", "wrapped")
    )
    assert facts == plain_facts
    assert (facts.architecture, facts.profile) == ("resnet20-16", "equal")
