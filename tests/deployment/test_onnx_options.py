"""Files in other dress: half inputs, folded normalisation, dynamic size, weights of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from learnt import logits, trained
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import zoo
import zoo.deployment.exporting
from zoo.deployment.exporting import export
from zoo.deployment.options import ExportOptions
from zoo.deployment.runtime import InferenceSession
from zoo.errors import ExportError, ZooError

CPU = "CPUExecutionProvider"


def test_half_inputs_are_fp16_and_only_for_fp16(tmp_path: Path) -> None:
    model, splits = trained("cnet")
    images = splits.val.normalise(splits.val.images)
    options = ExportOptions(half_inputs=True)
    export(model, tmp_path / "m.onnx", inputs=images, precision="fp16", options=options)
    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT16}
    got = InferenceSession(tmp_path / "m.onnx", CPU)(images)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits(model, images), rtol=0.02, atol=0.05)
    with pytest.raises(ExportError, match="half_inputs are for fp16 files, not fp32"):
        export(model, tmp_path / "n.onnx", inputs=images, options=options)


def test_folded_normalisation_takes_images_of_0_to_1(tmp_path: Path) -> None:
    model, splits = trained("cnet")
    path = tmp_path / "m.onnx"
    export(model, path, inputs=splits.val, options=ExportOptions(fold=True))
    session = InferenceSession(path, CPU)
    expected = logits(model, splits.val.normalise(splits.val.images))
    got = session(splits.val.images.float() / 255)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert session.metadata.folded
    assert session.metadata.mean == splits.val.mean


def test_the_file_knows_how_its_images_were_normalised(tmp_path: Path) -> None:
    model, splits = trained("cnet")
    images = splits.val.normalise(splits.val.images)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    for inputs, options, expected in (
        (
            DataLoader(Subset(splits.val, range(20)), 7),
            ExportOptions(),
            (splits.val.mean, splits.val.std),
        ),
        (images, ExportOptions(mean=mean, std=std), (mean, std)),
        (splits.val, ExportOptions(mean=list(mean), std=np.array(std)), (mean, std)),
    ):
        export(model, tmp_path / "m.onnx", inputs=inputs, options=options)
        metadata = InferenceSession(tmp_path / "m.onnx", CPU).metadata
        assert (metadata.mean, metadata.std) == expected
        assert not metadata.folded
    for options, inputs in (
        (ExportOptions(fold=True), images),
        (ExportOptions(mean=mean), images),
        (ExportOptions(mean=mean), splits.val),
        (ExportOptions(std=std), splits.val),
        (ExportOptions(mean=mean[:2], std=std[:2]), images),
        (ExportOptions(mean=mean, std=(0.0, 1.0, 1.0)), images),
        (ExportOptions(mean=(float("nan"), 0.0, 0.0), std=std), images),
        (ExportOptions(mean=mean, std=(float("inf"), 1.0, 1.0)), images),
    ):
        with pytest.raises(ExportError, match="mean"):
            export(model, tmp_path / "n.onnx", inputs=inputs, options=options)
    assert not (tmp_path / "n.onnx").exists()
    with pytest.raises(ZooError, match="mean must be a number per channel, got 'grey'"):
        ExportOptions(mean="grey", std=std)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_dynamic_size_is_computed_as_pytorch_computes_it(precision: str, tmp_path: Path) -> None:
    model, splits = trained("resnet20-16")
    options = ExportOptions(dynamic_size=True)
    path = tmp_path / "m.onnx"
    export(model, path, inputs=splits.val, precision=precision, options=options)
    session = InferenceSession(path, CPU)
    assert session.image_shape == (None, 3, None, None)
    whole = splits.test.normalise(splits.test.images[:40])
    for size in ((8, 8), (12, 16), (24, 9)):
        images = nn.functional.interpolate(whole, size)
        got, expected = session(images), logits(model, images)
        if precision == "fp32":
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        else:
            assert (got.argmax(1) == expected.argmax(1)).double().mean() >= 0.95
            assert (got - expected).abs().max() <= 0.25 * expected.abs().max()


class Numbered(Dataset):
    """Images whose labels are NumPy's, and which say how many classes they have, not which."""

    classes = 6

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels.numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, np.int64]:
        return self.images[index], self.labels[index]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_data_sets_own_mean_and_std_may_be_lists_and_arrays(kind: Any, tmp_path: Path) -> None:
    model, splits = trained("cnet")
    data = Numbered(splits.val.normalise(splits.val.images), splits.val.labels)
    data.mean, data.std = kind([0.5, 0.25, 0.125]), kind([0.5, 0.5, 0.25])
    export(model, tmp_path / "m.onnx", inputs=data)
    metadata = InferenceSession(tmp_path / "m.onnx", CPU).metadata
    assert (metadata.mean, metadata.std) == ((0.5, 0.25, 0.125), (0.5, 0.5, 0.25))
    signals = Numbered(torch.rand(8, 3), splits.val.labels[:8])
    signals.mean, signals.std = data.mean, data.std
    export(nn.Linear(3, 6), tmp_path / "m.onnx", inputs=signals)
    assert InferenceSession(tmp_path / "m.onnx", CPU).metadata.mean == ()


def test_labels_and_numbers_of_numpy_are_taken_and_a_dense_file_names_its_architecture(
    tmp_path: Path,
) -> None:
    model, splits = trained("cnet")
    data = Numbered(splits.val.normalise(splits.val.images), splits.val.labels)
    options = ExportOptions(pad=np.int64(4), arch="another")
    result = export(model, tmp_path / "m.onnx", inputs=data, options=options)
    assert result.accuracy == result.module_accuracy > 0.6
    metadata = InferenceSession(tmp_path / "m.onnx", CPU).metadata
    assert (metadata.classes, metadata.pad, metadata.architecture) == ((), 4, "cnet")
    dense = zoo.create_model("cnet", 6, image_size=8)
    export(dense, tmp_path / "dense.onnx", inputs=data, options=ExportOptions(arch="cnet"))
    assert InferenceSession(tmp_path / "dense.onnx", CPU).metadata.architecture == "cnet"


def test_a_network_that_depends_on_the_size_says_so(tmp_path: Path) -> None:
    model, splits = trained("cnet")
    with pytest.raises(ExportError, match=r"3, 16, 16.*Export without dynamic_size"):
        export(model, tmp_path / "m.onnx", inputs=splits.val,
               options=ExportOptions(dynamic_size=True))  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_large_weights_have_a_file_of_their_own(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, splits = trained("cnet")
    path = tmp_path / "m.onnx"
    images = splits.test.normalise(splits.test.images[:20])
    export(model, path, inputs=splits.val, precision=precision)
    whole = InferenceSession(path, CPU)(images)
    monkeypatch.setattr(zoo.deployment.files, "EXTERNAL_BYTES", 1000)
    result = export(model, path, inputs=splits.val, precision=precision)
    files = {entry.name: entry.stat().st_size for entry in tmp_path.iterdir()}
    assert sum(files.values()) == result.bytes
    assert files["m.onnx"] < 0.5 * result.bytes
    assert torch.equal(InferenceSession(path, CPU)(images), whole)
    neighbours = {"m.onnx.training.data", "m.onnx.onnx.0123456789abcdef.data", "m.onnx.0123.data"}
    for name in neighbours:
        (tmp_path / name).write_text("somebody else's")
    changed = copy.deepcopy(model)
    changed.fc.weight.data.mul_(2)
    export(changed, path, inputs=splits.val, precision=precision)
    assert {entry.name for entry in tmp_path.iterdir()} >= neighbours
    for name in neighbours:
        (tmp_path / name).unlink()
    others = {entry.name for entry in tmp_path.iterdir()} - {"m.onnx"}
    assert len(others) == 1
    assert not others & files.keys()
    monkeypatch.undo()
    export(model, path, inputs=splits.val, precision=precision)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_lost_weights_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, splits = trained("cnet")
    monkeypatch.setattr(zoo.deployment.files, "EXTERNAL_BYTES", 1000)
    export(model, tmp_path / "m.onnx", inputs=splits.val)
    next(tmp_path.glob("*.data")).unlink()
    with pytest.raises(ExportError, match=r"cannot load .*m\.onnx"):
        InferenceSession(tmp_path / "m.onnx", CPU)
