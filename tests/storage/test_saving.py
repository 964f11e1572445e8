"""Networks and folders as users have them: what is saved is read back, or what was there stays."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import CheckpointError
from zoo.models import build_model, parameter_count
from zoo.spec.plans import Source


@pytest.fixture
def pruned() -> nn.Module:
    return zoo.load("resnet20-16", 2, build_model("resnet20-16", 10), profile="equal")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ],
)
def test_wrappers_are_seen_through(wrap, pruned: nn.Module, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    zoo.save(wrap(pruned), tmp_path / "saved")
    assert torch.equal(zoo.load_pruned(tmp_path / "saved")(images), pruned(images))


def test_a_part_that_is_compiled_is_saved_under_its_own_names(pruned, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    expected = pruned(images)
    pruned.layer1 = torch.compile(pruned.layer1, backend="eager")
    zoo.save(pruned, tmp_path / "saved")
    assert torch.equal(zoo.load_pruned(tmp_path / "saved")(images), expected)


def test_an_average_of_a_pruned_network_is_saved_by_its_part(pruned, tmp_path: Path) -> None:
    average = torch.optim.swa_utils.AveragedModel(pruned)
    with pytest.raises(CheckpointError, match=r"AveragedModel .* its part 'module' is.*\(\.module"):
        zoo.save(average, tmp_path / "saved")
    zoo.save(average.module, tmp_path / "saved")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(zoo.load_pruned(tmp_path / "saved")(images), pruned(images))


def test_what_a_network_that_is_not_pruned_is_told_to_do_can_be_done(tmp_path: Path) -> None:
    model, path = build_model("resnet20-16", 10), tmp_path / "dense.pt"
    with pytest.raises(CheckpointError, match=r"not pruned.* torch\.save\(model\.state_dict\(\)"):
        zoo.save(model, tmp_path / "saved")
    torch.save(model.state_dict(), path)
    zoo.save(zoo.load("resnet20-16", 2, path, profile="equal"), tmp_path / "saved")


def test_a_classifier_of_other_classes_is_part_of_the_record(pruned, tmp_path: Path) -> None:
    pruned.fc = nn.Linear(pruned.fc.in_features, 37)
    zoo.save(pruned, tmp_path / "saved")
    again = zoo.load_pruned(tmp_path / "saved")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), pruned(images))
    record = again.pruning
    assert (record.num_classes, record.new_classifier) == (37, True)
    assert record.plan.pruned.params == parameter_count(again)
    dense = build_model("resnet20-16", 37)
    assert record.plan.dense.params == parameter_count(dense)
    assert record.plan.got == record.plan.dense.params / record.plan.pruned.params


def test_what_could_not_be_read_again_is_refused_and_the_old_folder_stays(pruned, tmp_path) -> None:
    folder = zoo.save(pruned, tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pruned.fc = nn.Sequential(nn.Dropout(0.2), pruned.fc)
    with pytest.raises(CheckpointError, match=r"no longer the one .* fc\.1\.bias is unexpected"):
        zoo.save(pruned, folder)
    live = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    live = zoo.prune(live, torch.rand(1, 3, 8, 8), cf=2)
    live[3] = nn.Linear(live[3].in_features, 9)
    with pytest.raises(CheckpointError, match=r"no longer .* parameters, the plan has"):
        zoo.save(live, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_mounted_folder_is_written_into(pruned, tmp_path, monkeypatch) -> None:
    """A mount can neither be renamed nor replaced, and moves out of it and into it fail too."""
    place = tmp_path / "mount"
    place.mkdir()

    def within(real):
        def move(source, target):
            if {place in Path(path).parents for path in (source, target)} != {True}:
                raise OSError(errno.EBUSY, "Device or resource busy")
            return real(source, target)

        return move

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, within(getattr(os, name)))
    for bias in (1, 2):  # an empty folder, and an older network
        with torch.no_grad():
            pruned.fc.bias += bias
        zoo.save(pruned, place)
        assert torch.equal(zoo.load_pruned(place).fc.bias, pruned.fc.bias)
    assert len(list(place.iterdir())) == 3


@pytest.mark.parametrize("source", ["module", "another.pt"])
def test_a_kill_leaves_no_weights_under_a_record_of_others(
    pruned, tmp_path, monkeypatch, source
) -> None:
    folder = tmp_path / "model"
    zoo.save(pruned, folder)
    old = pruned.fc.bias.clone()
    networks = {("module", 0.0), (source, 1.0)}
    with torch.no_grad():
        pruned.fc.bias += 1
    pruned.pruning = replace(pruned.pruning, source=Source(source))
    kills = []

    def copied(real):
        def call(*paths, **options):
            kills.append(shutil.copytree(folder, tmp_path / f"kill {len(kills)}"))
            return real(*paths, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink"):
            patch.setattr(os, name, copied(getattr(os, name)))
        zoo.save(pruned, folder)
    found = set()
    for kill in kills:
        if (kill / "pruning.json").exists():
            left = zoo.load_pruned(kill)
            found.add((left.pruning.source.reference, (left.fc.bias - old).mean().round().item()))
        else:
            assert source != "module"
            with pytest.raises(CheckpointError, match=r"pruning\.json is missing"):
                zoo.load_pruned(kill)
        zoo.save(pruned, kill)
        assert sorted(path.name for path in kill.iterdir()) == sorted(os.listdir(folder))
    assert found == networks
