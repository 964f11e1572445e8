"""Any user's checkpoint as a dense network, pruned models as folders: nothing is lost or run."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import zoo.checkpoints as checkpoints
from zoo.checkpoints import (
    load_dense,
    read_checkpoint,
    read_model,
    save_checkpoint,
    write_model,
)
from zoo.errors import CheckpointError, DocumentError, ZooError
from zoo.groups import ChannelGroups
from zoo.models import build_model
from zoo.pruning import surgery
from zoo.pruning.graph import channel_groups
from zoo.pruning.plan import PruningRecord, Source, make_plan
from zoo.pruning.surgery import named_tensors
from zoo.registry import stored_groups


def randomised(module: nn.Module) -> nn.Module:
    """`module` with every parameter and buffer drawn at random, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    for tensor in named_tensors(module).values():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05
            tensor.data.copy_(noise)
    return module.eval()


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
def dense() -> nn.Module:
    return randomised(build_model("resnet20-16", 7))


@pytest.fixture
def pruned(dense: nn.Module) -> nn.Module:
    groups = stored_groups("resnet20-16")
    assert groups is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(dense).items()}
    return cut(dense, groups.adapted(shapes), "resnet20-16")


def same_state(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- reading --------------------------------------------------------------------------------------


def test_every_kind_of_weights_gives_the_same_network(dense, tmp_path):
    state = dense.state_dict()
    for suffix in (".pt", ".pth", ".bin", ".ckpt"):
        torch.save(state, tmp_path / f"m{suffix}")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_checkpoint(dense, tmp_path / "m.safetensors", {"data": "toy"})
    for weights in (*sorted(tmp_path.iterdir()), str(tmp_path / "m.pt"), state, dense):
        module, _, classes, size = load_dense("resnet20-16", weights)
        assert same_state(module, state), weights
        assert (classes, size) == (7, 32)
        assert not module.training


@pytest.mark.parametrize("wrapper", checkpoints.WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_taken_off(dense, tmp_path, wrapper, prefix):
    state = dense.state_dict()
    inner = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "loss": torch.tensor(0.1), wrapper: inner}, tmp_path / "m.pt")
    found = read_checkpoint(tmp_path / "m.pt").state
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) for k in state)


def test_wrappers_nest_and_averaged_models_are_read(dense):
    averaged = torch.optim.swa_utils.AveragedModel(dense)
    assert read_checkpoint({"state_dict": {"ema": averaged.state_dict()}}).shapes.keys() == (
        dense.state_dict().keys()
    )
    assert read_checkpoint({"model": dense}).shapes.keys() == dense.state_dict().keys()


def test_a_prefix_that_only_some_names_have_stays():
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(read_checkpoint(mixed).state) == ["module.a", "b"]


def test_source_is_the_reference_and_the_digest_of_the_file(dense, tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(dense, path, {"image_size": "16", "data": "toy"})
    checkpoint = read_checkpoint(path)
    assert checkpoint.source == Source(str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    assert checkpoint.metadata == {"image_size": "16", "data": "toy"}
    assert read_checkpoint(dense).source == Source("module")
    assert read_checkpoint(dense.state_dict()).source == Source("state dict")


def test_what_training_scripts_store_beside_the_weights_is_passed_over(dense, tmp_path):
    beside = {
        "args": argparse.Namespace(lr=0.1),
        "accuracy": np.float64(0.9),
        "count": np.int64(3),
        "history": np.arange(4.0),
        "path": pathlib.Path("run/1"),
        "optimizer": torch.optim.SGD(dense.parameters(), 0.1).state_dict(),
        "state_dict": dense.state_dict(),
    }
    torch.save(beside, tmp_path / "m.pt")
    assert same_state(load_dense("resnet20-16", tmp_path / "m.pt")[0], dense.state_dict())


class Bomb:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(dense, tmp_path, zipped):
    flag, path = tmp_path / "ran", tmp_path / "evil.pt"
    state = dense.state_dict()
    torch.save(
        {"state_dict": state, "args": Bomb(f"touch {flag}")},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        CheckpointError, match=r"not a plain tensor checkpoint.*posix\.system"
    ) as caught:
        load_dense("resnet20-16", path)
    assert not flag.exists()
    assert "convert it to safetensors" in str(caught.value)
    torch.load(path, weights_only=False)  # the file is live: pickle itself does run it
    assert flag.exists()


@pytest.mark.filterwarnings("ignore")
def test_pickled_modules_and_scripts_are_refused(dense, tmp_path):
    torch.save({"model": dense}, tmp_path / "module.pt")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    for name in ("module.pt", "script.pt"):
        with pytest.raises(CheckpointError, match="not a plain tensor checkpoint"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["m.pt", "old.pt", "m.safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_called_so(dense, tmp_path, name, part):
    path = tmp_path / name
    if name == "m.safetensors":
        save_checkpoint(dense, path, {})
    else:
        torch.save(dense.state_dict(), path, _use_new_zipfile_serialization=name == "m.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(path)


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><p>Not found</p>")
    (tmp_path / "list.safetensors").write_bytes((9).to_bytes(8, "little") + b"[1, 2, 3]")
    for name in ("page.pt", "list.safetensors"):
        with pytest.raises(CheckpointError, match="truncated or not a"):
            read_checkpoint(tmp_path / name)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    (tmp_path / "resnet.pth").touch()
    with pytest.raises(CheckpointError, match=r"resnet\.pt does not exist.*resnet\.pth"):
        read_checkpoint(tmp_path / "resnet.pt")
    with pytest.raises(CheckpointError, match="is a folder; name the file"):
        read_checkpoint(tmp_path)


def test_weights_of_no_known_kind():
    with pytest.raises(CheckpointError, match="not NoneType"):
        read_checkpoint(None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"no tensors.*epoch, weights"):
        read_checkpoint({"epoch": 1, "weights": {"a": torch.ones(1)}})
    with pytest.raises(CheckpointError, match="no tensors"):
        read_checkpoint({})
    loop: dict = {}
    loop["model"] = loop
    with pytest.raises(CheckpointError, match="no tensors"):
        read_checkpoint(loop)
    with pytest.raises(CheckpointError, match="a is not an ordinary dense tensor"):
        read_checkpoint({"a": torch.eye(2).to_sparse()})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_refused_by_name(dense, tmp_path, value):
    with torch.no_grad():
        dense.layer2[0].conv1.weight[3, 0, 0, :2] = value
        dense.fc.bias[0] = value
    torch.save(dense.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"2 of \d+ values of layer2\.0\.conv1\.weight"):
        read_checkpoint(tmp_path / "m.pt")


@pytest.fixture
def hub_files(dense, tmp_path, monkeypatch) -> list[str]:
    """The listing of a repository each of whose files is the same safetensors file."""
    files: list[str] = []
    save_checkpoint(dense, tmp_path / "blob.safetensors", {})
    monkeypatch.setattr(checkpoints.hub, "list_files", lambda _repo, _revision: files)
    monkeypatch.setattr(
        checkpoints.hub, "download", lambda _repo, _name, _revision: tmp_path / "blob.safetensors"
    )
    return files


@pytest.mark.parametrize(
    ("files", "asked", "reference"),
    [
        (["README.md", "w.bin"], "hf:a/r", "hf:a/r/w.bin"),
        (["a.pt", "model.safetensors"], "hf:a/r@v2", "hf:a/r/model.safetensors@v2"),
        (["x.pt", "y.pt"], "hf:a/r/y.pt", "hf:a/r/y.pt"),
    ],
)
def test_hub_references_find_the_weights_file(hub_files, files, asked, reference):
    hub_files += files
    assert read_checkpoint(asked).source.reference == reference


def test_an_ambiguous_hub_repository_lists_its_weights(hub_files):
    hub_files += ["README.md", "x.pt", "y.pt"]
    with pytest.raises(CheckpointError, match=r"x\.pt, y\.pt"):
        read_checkpoint("hf:a/r")


# --- dense networks -------------------------------------------------------------------------------


def test_the_loaded_network_shares_nothing_with_the_callers(dense):
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    for weights in (dense, dense.state_dict()):
        module, *_ = load_dense("resnet20-16", weights)
        with torch.no_grad():
            for tensor in named_tensors(module).values():
                tensor.zero_()
    assert same_state(dense, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dense, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in dense.state_dict().items()}
    module, *_ = load_dense("resnet20-16", state)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert torch.equal(module.conv1.weight, state["conv1.weight"].float())
    assert module.bn1.num_batches_tracked.dtype == torch.int64


def test_a_missing_batch_counter_is_no_mismatch(dense):
    state = {k: v for k, v in dense.state_dict().items() if "num_batches" not in k}
    module, *_ = load_dense("resnet20-16", state)
    assert int(module.bn1.num_batches_tracked) == 0
    assert torch.equal(module.bn1.running_var, dense.bn1.running_var)


def test_buffers_that_no_checkpoint_holds_are_right():
    pytest.importorskip("timm")
    theirs = randomised(build_model("timm:resnetblur18", 3))
    hidden = {n for n, _ in theirs.named_buffers()} - theirs.state_dict().keys()
    assert hidden  # the blur kernels are not persistent
    for name in hidden:
        fresh = dict(build_model("timm:resnetblur18", 3).named_buffers())[name]
        dict(theirs.named_buffers())[name].copy_(fresh)
    module, _, classes, _ = load_dense("timm:resnetblur18", theirs.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(module(image), theirs(image))
    assert classes == 3


def test_image_size_from_the_classifier_the_argument_the_metadata_or_the_reference(dense, tmp_path):
    cnet = build_model("cnet", 10, image_size=16)
    assert load_dense("cnet", cnet)[2:] == (10, 16)
    assert load_dense("cnet", cnet, image_size=16)[2:] == (10, 16)
    with pytest.raises(CheckpointError, match="16 pixels, not 32"):
        load_dense("cnet", cnet, image_size=32)
    path = tmp_path / "m.safetensors"
    save_checkpoint(dense, path, {"image_size": "16"})
    assert load_dense("resnet20-16", path)[3] == 16
    assert load_dense("resnet20-16", path, image_size=64)[3] == 64
    assert load_dense("resnet20-16", dense)[3] == 32
    save_checkpoint(dense, path, {"image_size": "big"})
    with pytest.raises(CheckpointError, match="'big'"):
        load_dense("resnet20-16", path)


def test_another_architectures_checkpoint_names_the_right_one():
    wide, cnet = build_model("resnet20-64", 5), build_model("cnet", 5, image_size=16)
    with pytest.raises(CheckpointError, match=r"fits 'resnet20-64'") as caught:
        load_dense("resnet20-16", wide)
    message = str(caught.value)
    assert "conv1.weight (expected (16, 3, 3, 3), got (64, 3, 3, 3))" in message
    assert "missing" not in message  # only shapes differ
    with pytest.raises(CheckpointError, match=r"unexpected.*fits 'cnet'"):
        load_dense("resnet20-16", cnet)
    with pytest.raises(CheckpointError, match=r"missing.*fits 'resnet20-64'"):
        load_dense("torchvision:vgg11", wide)


def test_a_mismatch_counts_and_names_three_of_each(dense):
    state = dict(dense.state_dict())
    for name in [n for n in state if n.startswith("layer3.2")][:5]:
        del state[name]
    state |= {f"head.{n}": torch.ones(1) for n in range(4)}
    state["bn1.weight"] = torch.ones(8)
    with pytest.raises(CheckpointError) as caught:
        load_dense("resnet20-16", state)
    message = str(caught.value)
    assert (
        "5 missing: layer3.2.conv1.weight, layer3.2.bn1.weight, layer3.2.bn1.bias, ..." in message
    )
    assert "4 unexpected: head.0, head.1, head.2, ..." in message
    assert "1 misshapen: bn1.weight (expected (16,), got (8,))." in message
    assert "fits" not in message.replace("does not fit", "")


def test_building_for_a_checkpoint_leaves_the_random_state_alone(dense):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_dense("resnet20-16", dense)
    assert torch.equal(torch.rand(3), expected)


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
from zoo.checkpoints import read_model
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
    with pytest.raises(CheckpointError, match=r"zoo\.load.*save_checkpoint"):
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

    monkeypatch.setattr(checkpoints, "write_text", full)


def fail_in_the_swap(monkeypatch):
    real = pathlib.Path.rename

    def rename(self, target):
        if self.parent.name.startswith(".model."):  # the new folder, after the old one moved away
            raise OSError(errno.EIO, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", rename)


@pytest.mark.parametrize("fail", [fail_in_save_file, fail_in_readme, fail_in_the_swap])
def test_a_failing_write_keeps_the_old_folder_bit_for_bit(pruned, tmp_path, monkeypatch, fail):
    write_model(pruned, tmp_path / "model")
    old = contents(tmp_path)
    with torch.no_grad():
        pruned.fc.bias += 1
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

    monkeypatch.setattr(checkpoints, "write_json", interrupt)
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
        (lambda d: d.update(architecture="resnet20-17"), ZooError, "Did you mean 'resnet20-16'"),
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
