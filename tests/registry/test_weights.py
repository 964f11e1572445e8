"""The trained weights that ship with the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import zoo
import zoo.registry.weights as weights
from zoo.cli import main
from zoo.errors import DocumentError, ZooError
from zoo.registry.store import registry_folder
from zoo.registry.weights import BundledWeights, list_weights, weights_path

BUNDLED = list_weights()


@pytest.mark.parametrize("entry", BUNDLED, ids=lambda entry: entry.reference)
def test_bundled_weights_are_a_trained_network_of_their_architecture(
    entry: BundledWeights,
) -> None:
    model = zoo.load(entry.architecture, 4, entry.reference)
    record = model.pruning
    assert record.source.reference == entry.reference
    assert record.source.sha256 == entry.sha256
    assert (record.num_classes, record.size) == (entry.num_classes, entry.image_size)
    assert record.plan.got > 2.5  # a profile is for the reference, whose images may be larger
    dense = zoo.create_model(entry.architecture, entry.num_classes, pretrained=entry.reference)
    x = torch.rand(64, 3, entry.image_size, entry.image_size)
    logits = dense.eval()(x)
    assert all(parameter.dtype == torch.float32 for parameter in dense.parameters())
    assert logits.std(0).mean() > 0.5  # an untrained network says the same of every image
    assert entry.test_accuracy > 3 / entry.num_classes


def test_they_are_small_and_listed_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    folder = registry_folder() / "weights"
    files = {path.name for path in folder.glob("*.safetensors")}
    assert files == {entry.file for entry in BUNDLED}
    assert sum((folder / name).stat().st_size for name in files) < 12_000_000
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    assert all(told.count(entry.reference) == 1 for entry in BUNDLED)
    assert main(["list", "--arch", "cnet"]) == 0
    assert "bundled:resnet20-16" not in capsys.readouterr().out


def test_other_weights_and_other_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZooError, match="Did you mean 'bundled:cnet/cifar10'"):
        zoo.load("cnet", 4, "bundled:cnet/cifar")
    shutil.copytree(registry_folder() / "weights", tmp_path / "weights")
    monkeypatch.setattr(weights, "registry_folder", lambda: tmp_path)
    (tmp_path / "weights" / "cnet-cifar10.safetensors").write_bytes(b"other")
    with pytest.raises(DocumentError, match="not the file that the index"):
        weights_path("bundled:cnet/cifar10")
