"""Killed, resumed, refused: a training that is interrupted ends as if it had not been."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
)
from toy import QUICK, network, same, weights

from zoo.cli import main
from zoo.errors import ZooError
from zoo.storage.checkpoints import HISTORY, SAVEPOINT
from zoo.training.engine import Engine
from zoo.training.finetuning import finetune

EPOCHS = 16
TRAIN = ["--arch", "cnet", "--data", "digits", "--size", "8", "--lr", "0.05"]
LONG = replace(QUICK, epochs=4, ema=0.9)


def flags(out: Path) -> list[str]:
    """A training with batch norm and an average."""
    recipe = out.parent / "ema.toml"
    recipe.write_text("ema = 0.9\n")
    network = ["--arch", "resnet20-16", "--recipe", str(recipe)]
    return ["train", *TRAIN, *network, "--epochs", str(EPOCHS), "--out", str(out)]


def history(out: Path) -> list[dict[str, float]]:
    return history_in(out.with_name(f"{out.name}.training"))


def history_in(folder: Path) -> list[dict[str, float]]:
    path = folder / HISTORY
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) | {"seconds": 0} for line in lines]


def live_until_killed(out: Path, pause: float) -> None:
    """One process that resumes the training, and SIGKILL `pause` seconds after its first epoch."""
    code = "import sys; from zoo.cli import main; sys.exit(main(sys.argv[1:]))"
    before = len(history(out))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags(out), "--resume"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while len(history(out)) == before and process.poll() is None:
        time.sleep(0.002)
    time.sleep(pause)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert before < len(history(out)) < EPOCHS


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert main(flags(whole)) == 0
    for _ in range(2):
        live_until_killed(broken, pause=random.random() / 4)
    assert main([*flags(broken), "--resume"]) == 0
    assert same(load_file(whole), load_file(broken))
    assert history(whole) == history(broken)
    assert len(history(whole)) == EPOCHS
    folder = tmp_path / "broken.safetensors.training"
    assert {path.name for path in folder.iterdir()} == {HISTORY, "history.png"}


def test_what_a_kill_left_half_written_is_removed(toy_images, tmp_path):
    for name in (SAVEPOINT, HISTORY):
        (tmp_path / f".123.{name}").touch()
    (tmp_path / ".123.mine").touch()
    finetune(network(), toy_images, None, recipe=QUICK, checkpoint=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {SAVEPOINT, HISTORY, ".123.mine"}


class Jittered(Dataset):
    """Images with noise of NumPy's and Python's generators."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = random.random() + np.random.random()
        return self.images[index] + noise, int(self.labels[index])


class Halved(DataLoader):
    """A loader with a loop of its own."""

    def __iter__(self):
        for images, labels in super().__iter__():
            yield images / 2, labels


LOADERS = {
    "loader": lambda data: DataLoader(
        data, 16, shuffle=True, generator=torch.Generator().manual_seed(0)
    ),
    "loader without a generator": lambda data: DataLoader(data, 16, shuffle=True),
    "sampler with a generator": lambda data: DataLoader(
        data, 16, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(0))
    ),
    "batch sampler": lambda data: DataLoader(
        data,
        batch_sampler=BatchSampler(
            RandomSampler(data, generator=torch.Generator().manual_seed(0)), 16, False
        ),
    ),
    "order of the epoch": lambda data: DataLoader(
        data, 16, sampler=DistributedSampler(data, num_replicas=1, rank=0)
    ),
    "loop of its own": lambda data: Halved(
        Jittered(*data.tensors), 16, shuffle=True, generator=torch.Generator().manual_seed(0)
    ),
    "dataset": lambda data: data,
    "noise": lambda data: Jittered(*data.tensors),
}


@pytest.mark.parametrize("kind", ["image set", *LOADERS])
@pytest.mark.parametrize("recipe", [LONG, replace(LONG, optimizer="adamw", lr=0.01, ema=0)])
def test_every_kind_of_data_resumes_bit_by_bit(toy_images, tmp_path, monkeypatch, kind, recipe):
    def data():
        if kind == "image set":
            return toy_images
        images = toy_images.normalise(toy_images.images)
        return LOADERS[kind](TensorDataset(images, toy_images.labels))

    options = {"recipe": recipe, "cpu": True}
    model = network()
    whole = finetune(model, data(), toy_images, **options)
    stop_in_epoch(3, monkeypatch)
    broken = network()
    options["checkpoint"] = tmp_path
    assert finetune(broken, data(), toy_images, **options).interrupted
    monkeypatch.undo()
    result = finetune(broken, data(), toy_images, resume=True, **options)
    assert same(weights(broken), weights(model))
    assert [r.loss for r in result.history] == [r.loss for r in whole.history]
    assert (result.initial, result.accuracy, result.epoch) == (
        whole.initial, whole.accuracy, whole.epoch,
    )  # fmt: skip


def stop_in_epoch(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of that epoch."""
    original, count = Engine._step, 0

    def step(self: Engine) -> None:
        nonlocal count
        count += 1
        if count == (last - 1) * 6 + 3:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Engine, "_step", step)


@pytest.fixture
def stopped(toy_images, tmp_path, monkeypatch) -> Path:
    """The folder of a training that was stopped in its second epoch."""
    with monkeypatch.context() as patch:
        stop_in_epoch(2, patch)
        finetune(network(), toy_images, toy_images, recipe=LONG, checkpoint=tmp_path, cpu=True)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe": replace(LONG, lr=0.01)}, r"its lr is 0\.05, here it is 0\.01"),
        ({"seed": 1}, "its seed is 0, here it is 1"),
        ({"model": network(classes=4)}, "its network is"),
        ({"teacher": network(seed=5)}, "its teacher is None"),
        ({"val": None}, "its validation data is"),
        ({"train": "other"}, "its training data is"),
    ],
)
def test_the_savepoint_of_another_training_is_refused(stopped, toy_images, change, told):
    if "train" in change:
        change = {"train": replace(toy_images, images=255 - toy_images.images)}
    options = {"model": network(), "train": toy_images, "val": toy_images, "recipe": LONG} | change
    before = weights(options["model"])
    with pytest.raises(ZooError, match=f"of another training: {told}"):
        finetune(checkpoint=stopped, resume=True, **options)
    assert same(weights(options["model"]), before)


def test_the_savepoint_of_another_version_is_refused(stopped, toy_images):
    path = stopped / SAVEPOINT
    found = torch.load(path, weights_only=True)
    found["identity"]["format"] = 1
    torch.save(found, path)
    with pytest.raises(ZooError, match="written by another version of prunezoo"):
        finetune(network(), toy_images, None, recipe=LONG, checkpoint=stopped, resume=True)


def test_a_savepoint_is_not_overwritten_unasked(stopped, toy_images):
    content = (stopped / SAVEPOINT).read_bytes()
    with pytest.raises(ZooError, match=r"unfinished training.*resume=True"):
        finetune(network(), toy_images, toy_images, recipe=LONG, checkpoint=stopped)
    assert (stopped / SAVEPOINT).read_bytes() == content
    with pytest.raises(ZooError, match="needs checkpoint="):
        finetune(network(), toy_images, toy_images, recipe=LONG, resume=True)


def test_a_folder_that_cannot_be_written_or_read_is_an_error_before_any_training(
    stopped, toy_images, tmp_path
):
    (tmp_path / "file").write_text("")
    before = weights(model := network())
    with pytest.raises(ZooError, match=r"Cannot write to .*file/sub"):
        finetune(model, toy_images, None, recipe=LONG, checkpoint=tmp_path / "file" / "sub")
    (stopped / SAVEPOINT).unlink()
    (stopped / SAVEPOINT).mkdir()
    with pytest.raises(ZooError, match=r"cannot be read: .*[Dd]irectory"):
        finetune(model, toy_images, None, recipe=LONG, checkpoint=stopped, resume=True)
    assert same(weights(model), before)


@pytest.mark.parametrize("content", [b"", b"garbage", "half", "pickle"])
def test_a_damaged_savepoint_is_an_error_and_runs_nothing(stopped, toy_images, content):
    path = stopped / SAVEPOINT
    if content == "half":
        content = path.read_bytes()[: path.stat().st_size // 2]
    if content == "pickle":
        torch.save(Trap(), path)
    else:
        path.write_bytes(content)
    with pytest.raises(ZooError, match="is damaged or not a savepoint"):
        finetune(network(), toy_images, toy_images, recipe=LONG, checkpoint=stopped, resume=True)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_a_full_disk_is_an_error_with_the_best_weights_in_place(toy_images, tmp_path, monkeypatch):
    plain = network()
    finetune(plain, toy_images, toy_images, recipe=LONG, cpu=True)
    real, written = Path.write_bytes, []

    def full(path, content):
        written.append(path)
        if len(written) == 3:
            real(path, b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    model = network()
    with pytest.raises(ZooError, match=r"Cannot write.*No space left"):
        finetune(model, toy_images, toy_images, recipe=LONG, checkpoint=tmp_path, cpu=True)
    monkeypatch.undo()
    assert len(history_in(tmp_path)) == 3
    assert {path.name for path in tmp_path.iterdir()} == {SAVEPOINT, HISTORY}
    finetune(model, toy_images, toy_images, recipe=LONG, checkpoint=tmp_path, resume=True, cpu=True)
    assert same(weights(model), weights(plain))


def test_a_finished_training_resumes_to_its_result_at_once(toy_images, tmp_path, monkeypatch):
    first, again = network(), network()
    result = finetune(first, toy_images, toy_images, recipe=QUICK, checkpoint=tmp_path)
    monkeypatch.setattr(Engine, "train", lambda *_, **__: pytest.fail("trained"))
    resumed = finetune(
        again, toy_images, toy_images, recipe=QUICK, checkpoint=tmp_path, resume=True
    )
    assert same(weights(first), weights(again))
    assert resumed.history == result.history


def test_ctrl_c_in_the_first_epoch_of_the_command_line_is_one_too(tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.safetensors"
    with monkeypatch.context() as patch:
        stop_in_epoch(1, patch)
        assert main(["train", *TRAIN, "--out", str(out)]) == 130
    shown = capsys.readouterr()
    assert "Add --resume" in shown.out
    assert not shown.err
    assert main(["train", *TRAIN, "--epochs", "1", "--out", str(out), "--resume"]) == 0


def test_finetune_on_the_command_line_resumes_into_its_folder(tmp_path, monkeypatch, capsys):
    base, small, out = tmp_path / "base.safetensors", tmp_path / "small", tmp_path / "tuned"
    assert main(["train", *TRAIN, "--epochs", "1", "--out", str(base)]) == 0
    weights_flag = ["--weights", str(base), "--profile", "equal"]
    assert main(["prune", "cnet", "--cf", "2", *weights_flag, "--out", str(small)]) == 0
    tune = ["finetune", str(small), "--data", "digits", "--epochs", "3", "--lr", "0.05"]
    assert main([*tune, "--out", str(tmp_path / "whole")]) == 0
    steps, original = 0, Engine.train

    def interrupted_in_the_second(*arguments, **options):
        nonlocal steps
        steps += 1
        if steps == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train", interrupted_in_the_second)
        assert main([*tune, "--out", str(out)]) == 130
    assert "Add --resume" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} >= {SAVEPOINT, HISTORY, "model.safetensors"}
    assert main([*tune, "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*tune, "--out", str(out), "--resume"]) == 0
    assert same(
        load_file(out / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    )
    assert not (out / SAVEPOINT).exists()
    assert len((out / HISTORY).read_text().splitlines()) == 3
