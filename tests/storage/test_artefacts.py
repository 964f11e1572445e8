"""Networks as files and folders: what was written comes back, and what was there is never lost."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from helpers import randomised, same_state
from safetensors import safe_open
from torch import nn

from zoo.errors import CheckpointError, DocumentError, ZooError
from zoo.registry.store import stored_groups
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import PruningRecord, Source, make_plan
from zoo.storage import artefacts
from zoo.storage.artefacts import read_model, save_checkpoint, write_model
from zoo.storage.checkpoints import HISTORY
from zoo.surgery import surgery
from zoo.surgery.surgery import named_tensors
from zoo.tracing.graph import channel_groups


def cut(dense: nn.Module, groups: ChannelGroups, arch: str, keep: float = 0.5) -> nn.Module:
    widths = {group.name: max(1, round(keep * group.size)) for group in groups.groups}
    scores = [torch.rand(group.size).tolist() for group in groups.groups]
    plan = make_plan(
        groups,
        widths,
        scores,
        profile="equal",
        metric="params",
        asked=4.0,
        criterion="random",
        seed=0,
    )
    pruned = surgery.apply(dense, groups, plan)
    pruned.pruning = PruningRecord(  # type: ignore[assignment]
        arch, 7, groups.image_size, plan, "pretrained", Source("base.pt", "0" * 64), {"torch": "2"}
    )
    return pruned.eval()


@pytest.fixture
def pruned(dense: nn.Module) -> nn.Module:
    groups = stored_groups("resnet20-16")
    assert groups is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(dense).items()}
    return cut(dense, groups.adapted(shapes), "resnet20-16")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- writing --------------------------------------------------------------------------------------


def test_saving_a_dense_checkpoint_replaces_the_old_one_or_leaves_it(dense, tmp_path, monkeypatch):
    path = tmp_path / "new" / "m.safetensors"
    save_checkpoint(dense.to(memory_format=torch.channels_last), path, {"data": "toy"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"data": "toy"}
    assert same_state(dense, safetensors.torch.load_file(path))
    old = path.read_bytes()

    fail_in_save_file(monkeypatch)
    with pytest.raises(ZooError, match=r"m\.safetensors.*No space left"):
        save_checkpoint(dense, path, {})
    assert contents(tmp_path) == {"new/m.safetensors": old}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_reloaded_model_computes_the_same_bits_in_a_fresh_process(pruned, tmp_path, layout):
    pruned.to(memory_format=layout)
    image = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.save({"image": image, "logits": pruned(image)}, tmp_path / "io.pt")
    write_model(pruned, tmp_path / "model")
    code = """
import sys, pickle, socket, torch
import torch.export
def forbidden(*_, **__): raise AssertionError("neither tracing nor the network is needed")
torch.export.export = socket.socket.connect = forbidden
torch.set_num_threads(1)
from zoo.storage.artefacts import read_model
model = read_model(sys.argv[1] + "/model")
io = torch.load(sys.argv[1] + "/io.pt", weights_only=True)
with torch.no_grad():
    assert torch.equal(model(io["image"]), io["logits"])
assert not model.training and model.conv1.out_channels == 8 and model.bn1.num_features == 8
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_model_round_trips_with_its_record(pruned, tmp_path):
    write_model(pruned, tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "model.safetensors",
        "pruning.json",
        "README.md",
    }
    again = read_model(tmp_path / "model")
    assert again.pruning == pruned.pruning
    assert type(again) is type(pruned)
    assert same_state(again, pruned.state_dict())
    write_model(again, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "model")


def test_a_half_precision_model_stays_one(pruned, tmp_path):
    write_model(pruned.half(), tmp_path / "model")
    assert same_state(read_model(tmp_path / "model"), pruned.state_dict())


def test_the_readme_says_what_it_is(pruned, tmp_path):
    write_model(pruned, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    cost = pruned.pruning.plan.pruned
    for part in (
        "resnet20-16",
        f"{cost.params:,}",
        f"{cost.macs:,}",
        "zoo.load_pruned(",
        "base.pt",
    ):
        assert part in text
    assert f"{pruned.pruning.plan.got:.2f}x" in text


def test_a_network_without_an_architecture_needs_its_skeleton(tmp_path):
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 7),
        )

    dense = randomised(network())
    pruned = cut(dense, channel_groups(dense, torch.zeros(1, 3, 8, 8)), "")
    write_model(pruned, tmp_path / "model")
    with pytest.raises(CheckpointError, match="skeleton="):
        read_model(tmp_path / "model")
    skeleton = network()
    before = {k: v.clone() for k, v in skeleton.state_dict().items()}
    again = read_model(tmp_path / "model", skeleton=skeleton)
    image = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(image), pruned(image))
    assert again[0].out_channels == 4
    assert same_state(skeleton, before)
    with pytest.raises(CheckpointError, match="does not belong"):
        read_model(tmp_path / "model", skeleton=nn.Sequential(nn.Linear(8, 7)))


def test_a_dense_model_is_not_written_as_a_pruned_one(dense, tmp_path):
    with pytest.raises(CheckpointError, match=r"zoo\.load.*torch\.save\("):
        write_model(dense, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def fail_in_save_file(monkeypatch):
    def full(_tensors, file, _metadata):
        pathlib.Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)


def fail_in_readme(monkeypatch):
    def full(_path, _text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artefacts, "write_text", full)


def fail_in_the_last_move(monkeypatch):
    real = os.replace

    def replace(source, target):
        if source.parent.name == "new" and source.name == "pruning.json":
            raise OSError(errno.EIO, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("fail", [fail_in_save_file, fail_in_readme, fail_in_the_last_move])
def test_a_failing_write_keeps_the_old_folder_bit_for_bit(pruned, tmp_path, monkeypatch, fail):
    write_model(pruned, tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()
    old = contents(tmp_path)
    pruned.fc = nn.Linear(pruned.fc.in_features, 5)  # another record
    fail(monkeypatch)
    with pytest.raises(ZooError, match=r"model: .*No space left"):
        write_model(pruned, tmp_path / "model")
    monkeypatch.undo()
    assert contents(tmp_path) == old
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    read_model(tmp_path / "model")


def test_a_disk_that_really_fills_up_keeps_the_old_folder(pruned, tmp_path):
    write_model(pruned, tmp_path / "model")
    old = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ZooError, match="Cannot write"):
            write_model(pruned, tmp_path / "model")
        with pytest.raises(ZooError, match="Cannot write"):
            save_checkpoint(pruned, tmp_path / "m.safetensors", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == old


def test_ctrl_c_during_a_write_keeps_the_old_folder(pruned, tmp_path, monkeypatch):
    write_model(pruned, tmp_path / "model")
    old = contents(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(artefacts, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_model(pruned, tmp_path / "model")
    assert contents(tmp_path) == old


def test_an_unwritable_destination_is_a_clear_error(pruned, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in ("file/model", "file/deep/model"):
        with pytest.raises(ZooError, match=f"Cannot write .*{target}"):
            write_model(pruned, tmp_path / target)
    with pytest.raises(ZooError, match="is a file"):
        write_model(pruned, tmp_path / "file")
    with pytest.raises(ZooError, match="Cannot write"):
        save_checkpoint(pruned, tmp_path / "file" / "m.safetensors", {})
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_folder_of_something_else_is_not_replaced(pruned, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not empty"):
        write_model(pruned, tmp_path / "thesis")
    assert contents(tmp_path) == {"thesis/chapter.tex": b"years of work"}
    (tmp_path / "empty").mkdir()
    write_model(pruned, tmp_path / "empty")
    assert read_model(tmp_path / "empty").pruning == pruned.pruning


def test_the_folder_of_a_training_and_its_trackers_takes_the_model(pruned, tmp_path):
    (tmp_path / "prunezoo").mkdir()
    (tmp_path / "prunezoo" / "events").write_text("a tracker's")
    with pytest.raises(CheckpointError, match="is not empty"):
        write_model(pruned, tmp_path)
    (tmp_path / HISTORY).write_text("{}")
    write_model(pruned, tmp_path)
    assert same_state(read_model(tmp_path), pruned.state_dict())
    assert (tmp_path / "prunezoo" / "events").read_text() == "a tracker's"


def test_writing_again_replaces_the_model_and_keeps_other_files(pruned, tmp_path):
    folder = tmp_path / "model"
    write_model(pruned, folder)
    (folder / "exports").mkdir()
    (folder / "exports" / "README.md").write_text("mine")
    (folder / "model.onnx").write_bytes(b"onnx")
    (tmp_path / "link").symlink_to(folder)
    with torch.no_grad():
        pruned.fc.bias += 1
    write_model(pruned, tmp_path / "link")
    assert torch.equal(read_model(folder).fc.bias, pruned.fc.bias)
    assert (folder / "exports" / "README.md").read_text() == "mine"
    assert (folder / "model.onnx").read_bytes() == b"onnx"
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "model"]


# --- reading back ---------------------------------------------------------------------------------


def edited(folder: pathlib.Path, change) -> None:
    document = json.loads((folder / "pruning.json").read_text())
    change(document)
    (folder / "pruning.json").write_text(json.dumps(document))


def rename_key(document):
    document["plan"]["keep_ratio"] = document["plan"].pop("keep_ratios")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (rename_key, DocumentError, "unknown key 'keep_ratio'.*'keep_ratios'"),
        (lambda d: d.update(schema_version=9), DocumentError, "schema_version is 9"),
        (lambda d: d.pop("schema_version"), DocumentError, "schema_version is None"),
        (lambda d: d.pop("source"), DocumentError, "'source' is missing"),
        (lambda d: d.update(architecture="resnet20-166"), ZooError, "Did you mean 'resnet20-16'"),
        (lambda d: d.update(architecture="resnet20-64"), CheckpointError, "dense parameters"),
        (lambda d: d.update(num_classes=8), CheckpointError, r"fc\.weight has shape"),
        (lambda d: d["plan"]["kept"]["conv1"].pop(), CheckpointError, r"conv1\.weight has shape"),
        (lambda d: d["plan"]["kept"].pop("conv1"), CheckpointError, "channel groups are not"),
        (
            lambda d: d["plan"]["pruned"].update(params=1),
            CheckpointError,
            "pruned parameters, the plan has 1",
        ),
    ],
)
def test_a_record_that_does_not_belong_is_refused(pruned, tmp_path, change, error, message):
    write_model(pruned, tmp_path / "model")
    edited(tmp_path / "model", change)
    with pytest.raises(error, match=message):
        read_model(tmp_path / "model")


def test_weights_of_another_model_are_refused(dense, pruned, tmp_path):
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(dense).items()}
    narrow = cut(dense, stored_groups("resnet20-16").adapted(shapes), "resnet20-16", keep=0.25)
    write_model(pruned, tmp_path / "wide")
    write_model(narrow, tmp_path / "narrow")
    os.replace(tmp_path / "narrow" / "model.safetensors", tmp_path / "wide" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"wide: .*does not belong.*the plan makes it"):
        read_model(tmp_path / "wide")


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_var"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused(pruned, tmp_path, name, dtype):
    write_model(pruned, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, name: tensors[name].to(dtype)}, path)
    with pytest.raises(CheckpointError, match=f"does not belong to .* {name} holds {dtype}, no"):
        read_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "pruning.json"])
def test_missing_and_damaged_files_are_named(pruned, tmp_path, name):
    write_model(pruned, tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ZooError, match=f"{name}"):
        read_model(tmp_path / "model")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_model(tmp_path / "model")


def test_equal_checkpoints_are_equal_files(tmp_path: pathlib.Path) -> None:
    """Their digest names a base network, wherever it was trained again."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    metadata = {f"key {n}": f"é \\ \n {n}" for n in range(12)}
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file, items in zip(files, (metadata, dict(reversed(metadata.items()))), strict=True):
        save_checkpoint(model, file, items)
    assert files[0].read_bytes() == files[1].read_bytes()
    with safe_open(files[0], framework="pt") as opened:
        assert opened.metadata() == metadata
        assert all(torch.equal(opened.get_tensor(n), t) for n, t in model.state_dict().items())
