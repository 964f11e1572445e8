"""Any user's checkpoint as a dense network: nothing in it is lost, and nothing in it is run."""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib

import numpy as np
import pytest
import torch
from helpers import randomised, same_state
from torch import nn

import zoo.checkpoints as checkpoints
from zoo.artefacts import save_checkpoint
from zoo.checkpoints import Uninitialised, load_dense, read_checkpoint
from zoo.errors import CheckpointError
from zoo.models import build_model
from zoo.pruning.plan import Source
from zoo.pruning.surgery import named_tensors

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


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("net.backbone.", {}),
        ("net.backbone.", {"net.head.weight": torch.ones(3), "scale": torch.ones(1)}),
        ("model.", {"loss.weight": torch.ones(7)}),
        ("teacher.model.", {f"queue.{n}": torch.ones(1) for n in range(200)}),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_network_inside_another_is_found(dense, prefix, others, adapted):
    state = dense.state_dict()
    own = {n.replace("downsample", "shortcut") if adapted else n: t for n, t in state.items()}
    stored = {prefix + name: tensor for name, tensor in own.items()} | others
    with pytest.warns(UserWarning, match="were taken") as warned:
        module, _, classes, _ = load_dense("resnet20-16", {"state_dict": stored})
    assert same_state(module, state)
    assert classes == 7
    (warning,) = warned
    said = str(warning.message)
    assert repr(prefix) in said
    assert f"{len(others)} others" in said
    assert all(name in said for name in list(others)[:3])


def test_two_networks_in_one_checkpoint_are_an_error_that_names_both(dense):
    state = dense.state_dict()
    stored = {f"{which}.{name}": t for which in ("student", "teacher") for name, t in state.items()}
    with pytest.raises(CheckpointError, match=r"'student\.' and under 'teacher\.'"):
        load_dense("resnet20-16", stored)
    stored["teacher.fc.weight"] = stored["teacher.fc.weight"][:, 1:]
    with pytest.warns(UserWarning, match=r"under 'student\.'"):
        load_dense("resnet20-16", stored)
    stored["student.fc.weight"] = stored["student.fc.weight"][:, 1:]
    with pytest.raises(CheckpointError, match=r"does not fit 'resnet20-16'.* unexpected: student"):
        load_dense("resnet20-16", stored)


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


def test_building_without_initial_values_ends_where_drawing_repeats_until_it_fits() -> None:
    with Uninitialised():
        layer = torch.nn.Linear(4, 4)
        with torch.no_grad():
            layer.weight.fill_(100)
        torch.nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
        torch.nn.init.kaiming_uniform_(layer.bias[None])
    assert layer.weight.abs().max() <= 0.2
