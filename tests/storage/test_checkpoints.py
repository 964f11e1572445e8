"""Any user's checkpoint as tensors by name: nothing in it is lost, and nothing in it is run."""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import pathlib
import warnings

import numpy as np
import pytest
import torch
from helpers import same_state
from torch import nn

import zoo.storage.checkpoints as checkpoints
from zoo.errors import CheckpointError
from zoo.spec.plans import Source
from zoo.storage.artefacts import save_checkpoint
from zoo.storage.checkpoints import read_checkpoint
from zoo.storage.dense import load_dense
from zoo.storage.wrappers import AVERAGES, WRAPPERS


def test_every_kind_of_weights_gives_the_same_network(dense, tmp_path):
    state = dense.state_dict()
    for suffix in (".pt", ".pth", ".bin", ".ckpt"):
        torch.save(state, tmp_path / f"m{suffix}")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_checkpoint(dense, tmp_path / "m.safetensors", {"data": "toy"})
    for weights in (*sorted(tmp_path.iterdir()), str(tmp_path / "m.pt"), state, dense):
        found = load_dense("resnet20-16", weights)
        assert same_state(found.module, state), weights
        assert (found.num_classes, found.image_size) == (7, 32)
        assert not found.module.training


@pytest.mark.parametrize("wrapper", [*WRAPPERS, *AVERAGES])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_taken_off(dense, tmp_path, wrapper, prefix):
    state = dense.state_dict()
    inner = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "loss": torch.tensor(0.1), wrapper: inner}, tmp_path / "m.pt")
    found = read_checkpoint(tmp_path / "m.pt").state
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) for k in state)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
)
def test_parts_that_were_wrapped_one_by_one_are_read(dense, wrapper):
    state = dense.state_dict()
    wrapped = dict(state)
    for part in ("layer3.", "layer1.0."):
        wrapped = {k.replace(part, f"{part}{wrapper}."): v for k, v in wrapped.items()}
    outside = {f"module.{wrapper}.{name}": tensor for name, tensor in wrapped.items()}
    for weights in (wrapped, outside):
        assert same_state(load_dense("resnet20-16", weights).module, state)


def test_a_network_of_compiled_parts_is_read(dense):
    state = dense.state_dict()
    model = copy.deepcopy(dense)
    model.layer3 = torch.compile(model.layer3, backend="eager")
    for weights in (model, model.state_dict()):
        assert same_state(load_dense("resnet20-16", weights).module, state)


def test_names_that_only_look_wrapped_stay():
    state = {"a_orig_mod.weight": torch.ones(1), "b._orig_mod": torch.ones(1)}
    assert read_checkpoint(state).state.keys() == state.keys()
    twice = {"a.weight": torch.ones(1), "a._orig_mod.weight": torch.zeros(1)}
    assert read_checkpoint(twice).state.keys() == twice.keys()


def test_wrappers_nest_and_averaged_models_are_read(dense):
    averaged = torch.optim.swa_utils.AveragedModel(dense)
    assert read_checkpoint({"state_dict": {"ema": averaged.state_dict()}}).shapes.keys() == (
        dense.state_dict().keys()
    )
    assert read_checkpoint({"model": dense}).shapes.keys() == dense.state_dict().keys()


def averaged_beside(dense: nn.Module, kind: str) -> dict:
    """A training checkpoint as `kind` writes it: its weights are zeros, their average `dense`'s."""
    average = dense.state_dict()
    current = {name: torch.zeros_like(tensor) for name, tensor in average.items()}
    wrapped = torch.optim.swa_utils.AveragedModel(dense).state_dict()
    assert {name.partition(".")[0] for name in wrapped} == {"n_averaged", "module"}
    lightning, others = ({f"net.{n}": t for n, t in s.items()} for s in (average, current))
    return {
        "timm": {"epoch": 9, "arch": "x", "state_dict": current, "state_dict_ema": average},
        "timm, both in DataParallel": {
            "state_dict": {f"module.{n}": t for n, t in current.items()},
            "state_dict_ema": {f"module.{n}": t for n, t in average.items()},
        },
        "torchvision's scripts": {"model": current, "model_ema": wrapped, "scaler": {"scale": 1.0}},
        "Ultralytics": {"model": current, "ema": average, "updates": 7},
        "Lightning's WeightAveraging": {
            "state_dict": lightning,
            "current_model_state": others,
            "averaging_state": {"n_averaged": torch.tensor(3)},
        },
        "nested": {"model": {"state_dict": current, "state_dict_ema": average}},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "taken", "left"),
    [
        ("timm", "state_dict_ema", "state_dict"),
        ("timm, both in DataParallel", "state_dict_ema", "state_dict"),
        ("torchvision's scripts", "model_ema", "model"),
        ("Ultralytics", "ema", "model"),
        ("Lightning's WeightAveraging", "state_dict", "current_model_state"),
        ("nested", "state_dict_ema", "state_dict"),
    ],
)
def test_averaged_weights_are_taken_and_named_and_the_others_on_request(
    dense, tmp_path, kind, taken, left, recwarn
):
    content = averaged_beside(dense, kind)
    torch.save(content, tmp_path / "m.pt")
    at_ends = "net." if kind.startswith("Lightning") else ""
    for weights in (content, tmp_path / "m.pt"):
        recwarn.clear()
        checkpoint = read_checkpoint(weights)
        assert f"the averaged weights in {taken!r} were taken, and those in {left!r} left out" in (
            str(recwarn.pop(UserWarning).message)
        )
        found = {name.removeprefix(at_ends): t for name, t in checkpoint.state.items()}
        assert same_state(dense, found)
        assert checkpoint.source.averaged is True
        others = read_checkpoint(weights, ema=False)
        assert not recwarn.list
        assert others.state.keys() == checkpoint.state.keys()
        assert not any(tensor.any() for tensor in others.state.values())
        assert others.source.averaged is False


def test_timm_reads_the_weights_that_are_read_here(dense, tmp_path):
    helpers = pytest.importorskip("timm.models")
    path = tmp_path / "last.pth.tar"
    for kind in ("timm", "timm, both in DataParallel", "torchvision's scripts"):
        content = averaged_beside(dense, kind)
        torch.save(content, path)
        for ema in (True, False):
            theirs = helpers.load_state_dict(str(path), use_ema=ema)
            theirs.pop("n_averaged", None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ours = read_checkpoint(path, ema=ema).state
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("average", [{}, {"shadow_params": [torch.ones(2)], "decay": 0.9}])
def test_an_average_that_is_no_state_dict_is_left_out_and_said(dense, average):
    with pytest.warns(UserWarning, match=r"in 'model' were taken, because .* 'ema' lack"):
        checkpoint = read_checkpoint({"model": dense.state_dict(), "ema": average})
    assert same_state(dense, checkpoint.state)
    assert checkpoint.source.averaged is False


def test_a_place_for_an_average_that_was_not_kept_is_no_news(dense, recwarn):
    checkpoint = read_checkpoint({"state_dict": dense.state_dict(), "state_dict_ema": None})
    assert not recwarn.list
    assert same_state(dense, checkpoint.state)
    assert checkpoint.source.averaged is None


def test_an_average_of_the_parameters_alone_is_left_out_and_said(dense):
    state = dense.state_dict()
    parameters = {name: torch.zeros_like(tensor) for name, tensor in dense.named_parameters()}
    content = {"state_dict": state, "state_dict_ema": parameters}
    lacking = len(state) - len(parameters) - sum("num_batches" in name for name in state)
    with pytest.warns(UserWarning, match=rf"'state_dict_ema' lack {lacking} tensors: bn1\.running"):
        checkpoint = read_checkpoint(content)
    assert same_state(dense, checkpoint.state)
    assert checkpoint.source.averaged is False


def test_averaged_weights_alone_are_taken_in_silence_and_refused_on_request(dense, recwarn):
    checkpoint = read_checkpoint({"model_ema": dense.state_dict()})
    assert not recwarn.list
    assert checkpoint.source.averaged is None
    with pytest.raises(CheckpointError, match=r"averaged weights alone, in 'model_ema'"):
        read_checkpoint({"model_ema": dense.state_dict()}, ema=False)


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
    assert same_state(load_dense("resnet20-16", tmp_path / "m.pt").module, dense.state_dict())


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


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.safetensors.index.json", r"the index of a checkpoint in parts\..* its state dict"),
        ("m.onnx", r"m\.onnx is no PyTorch checkpoint: .* end in \.safetensors, .*\.ckpt\."),
        ("m.NPZ", "is no PyTorch checkpoint"),
        ("config.json", "is no PyTorch checkpoint"),
    ],
)
def test_files_of_other_kinds_are_not_told_as_damaged(tmp_path, name, told):
    if name == "m.NPZ":
        with (tmp_path / name).open("wb") as file:
            np.savez(file, weight=np.ones(3))
    else:
        (tmp_path / name).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=told):
        read_checkpoint(tmp_path / name)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    (tmp_path / "resnet.pth").touch()
    with pytest.raises(CheckpointError, match=r"resnet\.pt does not exist.*resnet\.pth"):
        read_checkpoint(tmp_path / "resnet.pt")
    with pytest.raises(CheckpointError, match="is a folder; name the file"):
        read_checkpoint(tmp_path)


def test_what_exists_and_cannot_be_opened_is_not_told_as_missing(tmp_path):
    """A link to itself stands for a file without permission, which root has for every file."""
    path = tmp_path / "model.safetensors"
    path.symlink_to(path)
    for read in (checkpoints.read_safetensors, read_checkpoint):
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: "):
            read(path)
    path.unlink()
    path.symlink_to("nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist\.$"):
        checkpoints.read_safetensors(path)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_refused_by_name(dense, tmp_path, value):
    with torch.no_grad():
        dense.layer2[0].conv1.weight[3, 0, 0, :2] = value
        dense.fc.bias[0] = value
    torch.save(dense.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"2 of \d+ values of layer2\.0\.conv1\.weight"):
        load_dense("resnet20-16", tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensor: tensor.to_sparse(), "sparse_coo"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda tensor: tensor.to(torch.float8_e5m2), "float8_e5m2"),
        (lambda tensor: tensor.to("meta"), "meta"),
    ],
)
def test_a_tensor_that_is_not_dense_is_refused_by_name(dense, tmp_path, change, told):
    state = dense.state_dict()
    state["fc.weight"] = change(state["fc.weight"])
    torch.save(state, tmp_path / "m.pt")
    for weights in (state, tmp_path / "m.pt"):
        with pytest.raises(
            CheckpointError, match=rf"fc\.weight is not an ordinary dense tensor, but .*{told}"
        ):
            load_dense("resnet20-16", weights)


def test_a_module_on_the_meta_device_is_refused(dense):
    with pytest.raises(CheckpointError, match=r"is not an ordinary dense tensor.*meta"):
        load_dense("resnet20-16", dense.to("meta"))


@pytest.fixture
def repository(dense, tmp_path, hub):
    """A function that makes the repository a/r of one safetensors file under several names."""
    save_checkpoint(dense, tmp_path / "blob.safetensors", {})
    content = (tmp_path / "blob.safetensors").read_bytes()
    return lambda *names: hub.add_repo("a/r", dict.fromkeys(names, content))


@pytest.mark.parametrize(
    ("files", "asked", "reference"),
    [
        (["notes.md", "w.safetensors"], "hf:a/r", "hf:a/r/w.safetensors"),
        (["a.pt", "model.safetensors"], "hf:a/r@main", "hf:a/r/model.safetensors"),
        (["x.pt", "y.safetensors"], "hf:a/r/y.safetensors", "hf:a/r/y.safetensors"),
    ],
)
def test_hub_references_find_the_weights_file_and_its_commit(repository, files, asked, reference):
    head = repository(*files)
    assert read_checkpoint(asked).source.reference == f"{reference}@{head}"


def test_an_ambiguous_hub_repository_lists_its_weights(repository):
    repository("notes.md", "x.pt", "y.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt, y\.pt"):
        read_checkpoint("hf:a/r")
    repository("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.bin.index.json")
    with pytest.raises(CheckpointError, match=r"has a checkpoint in parts: m-00001.*state dict"):
        read_checkpoint("hf:a/r")
