"""The dense network that a pruned one came from teaches it, if it is still what it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import randomised, same_state
from torch import nn
from toy import QUICK, network, same, weights

import zoo
from zoo.cli import main
from zoo.errors import CheckpointError, DataError, ZooError
from zoo.models import build_model
from zoo.storage.artefacts import save_checkpoint
from zoo.training.finetuning import finetune
from zoo.training.teachers import find_teacher, source_network

ONCE = replace(QUICK, epochs=1, batch_size=32)


def dense(seed: int = 0) -> nn.Module:
    return randomised(build_model("cnet", 3, image_size=8, seed=seed))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_checkpoint(dense(), tmp_path / "base.safetensors", {})
    return tmp_path / "base.safetensors"


def pruned(source: object) -> nn.Module:
    return zoo.load("cnet", 2, source, profile="equal")


def test_the_source_is_the_network_that_was_cut(base, tmp_path):
    small = pruned(base)
    assert same_state(source_network(small), dense().state_dict())
    folder = zoo.save(small, tmp_path / "small")
    assert same_state(source_network(zoo.load_pruned(folder)), dense().state_dict())


def test_by_default_the_source_teaches_where_it_can_be_read(base, toy_images):
    results = {}
    for name, teacher in (("given", dense()), ("source", "source"), ("none", None)):
        model = pruned(base)
        result = finetune(model, toy_images, None, teacher=teacher, recipe=ONCE, cpu=True)
        results[name] = weights(model)
        assert result.teacher == {"given": "CNet", "source": str(base), "none": None}[name]
    model = pruned(base)
    assert finetune(model, toy_images, None, recipe=ONCE, cpu=True).teacher == str(base)
    assert same(weights(model), results["source"])
    assert same(results["given"], results["source"])
    assert not same(results["none"], results["source"])
    base.unlink()
    torch.manual_seed(3)
    model = zoo.load("cnet", 2, dense(), profile="equal")
    assert finetune(model, toy_images, None, recipe=ONCE, cpu=True).teacher is None
    assert same(weights(model), results["none"])


def test_a_source_that_is_gone_or_changed_teaches_no_one(base, toy_images):
    model = pruned(base)
    before = weights(model)
    save_checkpoint(dense(), base, {"changed": "metadata alone"})
    with pytest.raises(CheckpointError, match=r"not what the network was pruned from.*sha256"):
        finetune(model, toy_images, None, teacher="source", recipe=ONCE)
    with pytest.warns(UserWarning, match=r"without a teacher.*not what the network was pruned"):
        assert find_teacher(model, "auto") == (None, None)
    base.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        finetune(model, toy_images, None, teacher="source", recipe=ONCE)
    with pytest.warns(UserWarning, match=r"without a teacher.*does not exist"):
        assert find_teacher(model, "auto") == (None, None)
    assert same(weights(model), before)


@pytest.mark.parametrize("kind", ["state dict", "module"])
def test_what_had_no_file_needs_a_teacher(kind, toy_images):
    model = pruned(dense() if kind == "module" else dense().state_dict())
    with pytest.raises(CheckpointError, match=rf"pruned from a {kind}.*as teacher="):
        finetune(model, toy_images, None, teacher="source", recipe=ONCE)
    assert find_teacher(model, "auto") == (None, None)


def test_a_new_classifier_is_not_taught_the_old_classes(base, toy_images):
    model = pruned(base)
    name, old = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    setattr(model, name, nn.Linear(old.in_features, 5))
    assert find_teacher(model, "auto") == (None, None)
    five = replace(toy_images, classes=tuple("abcde"))
    with pytest.raises(DataError, match="teacher has 3 outputs, the network 5"):
        finetune(model, five, None, teacher="source", recipe=ONCE)


class Twofold(nn.Module):
    """Gives its logits twice."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.mean((2, 3)), images.mean((2, 3))


class Refusing(nn.Module):
    """Raises without a message."""

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        raise AssertionError


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        (build_model("cnet", 3, image_size=16), r"teacher does not run on images.*\(1, 3, 8, 8\)"),
        (nn.Conv2d(1, 3, 8), r"teacher does not run on images.*1 channels"),
        (nn.Conv2d(3, 3, 1), r"the teacher gives \(1, 3, 8, 8\)"),
        (Twofold(), "the teacher gives tuple"),
        (Refusing(), r"\(1, 3, 8, 8\): AssertionError"),
    ],
)
def test_a_teacher_of_other_images_or_outputs_is_one_clear_error(teacher, told, toy_images):
    before = weights(model := network())
    with pytest.raises(DataError, match=told):
        finetune(model, toy_images, None, teacher=teacher, recipe=ONCE)
    assert same(weights(model), before)


@pytest.mark.filterwarnings("ignore:.*averaged weights")
@pytest.mark.parametrize("ema", [True, False])
def test_the_source_is_the_weights_that_were_taken_of_two(ema, tmp_path):
    average, current = dense(), build_model("cnet", 3, image_size=8, seed=5)
    content = {"state_dict": current.state_dict(), "state_dict_ema": average.state_dict()}
    torch.save(content, tmp_path / "base.pt")
    small = zoo.load("cnet", 2, tmp_path / "base.pt", profile="equal", ema=ema)
    folder = zoo.save(small, tmp_path / "small")
    expected = (average if ema else current).state_dict()
    assert same_state(source_network(zoo.load_pruned(folder)), expected)
    kind = "the averaged" if ema else "not the averaged"
    assert f"), {kind} weights" in (folder / "README.md").read_text()
    model = zoo.create_model("cnet", 3, pretrained=tmp_path / "base.pt", ema=ema)
    assert same_state(model, expected)


def test_a_source_without_these_classes_teaches_no_one(base, toy_images):
    model = zoo.load("cnet", 2, base, profile="equal", num_classes=5)
    five = replace(toy_images, classes=tuple("abcde"))
    assert find_teacher(model, "auto") == (None, None)
    with pytest.raises(CheckpointError, match=r"new classifier of 5 classes.*as teacher="):
        finetune(model, five, None, teacher="source", recipe=ONCE)
    assert finetune(model, five, None, recipe=ONCE, cpu=True).teacher is None


def test_a_network_without_a_record_has_no_source(toy_images):
    assert find_teacher(network(), "auto") == (None, None)
    with pytest.raises(ZooError, match="no record"):
        finetune(network(), toy_images, None, teacher="source", recipe=ONCE)
    with pytest.raises(ZooError, match="Did you mean 'source'"):
        finetune(network(), toy_images, None, teacher="sorce", recipe=ONCE)


def test_the_command_line_says_who_taught(tmp_path, capsys):
    base, small = tmp_path / "base.safetensors", tmp_path / "small"
    data = ["--data", "digits", "--epochs", "1", "--lr", "0.05"]
    assert main(["train", "--arch", "cnet", "--size", "8", *data, "--out", str(base)]) == 0
    flags = ["--weights", str(base), "--profile", "equal", "--out", str(small)]
    assert main(["prune", "cnet", "--cf", "2", *flags]) == 0
    told = {}
    for teacher in ("auto", "source", "none", str(base)):
        out = tmp_path / f"tuned {teacher.replace('/', ' ')}"
        command = ["finetune", str(small), *data, "--teacher", teacher, "--out", str(out)]
        assert main(command) == 0
        told[teacher] = capsys.readouterr().out.partition("taught by ")[2].split("\n")[0]
    assert told == {"auto": str(base), "source": str(base), "none": "", str(base): "CNet"}
