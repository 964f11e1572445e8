"""What a training tells while it runs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import ClassVar

import pytest
from accelerate import tracking
from torch.utils.data import BatchSampler, DataLoader
from toy import QUICK, network

from zoo.cli import main
from zoo.errors import ZooError
from zoo.training.finetuning import finetune
from zoo.training.reporting import progress_bar


class Noting(tracking.GeneralTracker):
    """A tracker that keeps what it was told."""

    name = "noting"
    requires_logging_directory = True
    told: ClassVar[list[tuple[str, object]]] = []

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.told.append(("begin", (run_name, str(logging_dir))))

    tracker = None

    def store_init_configuration(self, values: dict) -> None:
        self.told.append(("config", values))

    def log(self, values: dict, step: int | None = None) -> None:
        self.told.append((f"epoch {step}", values))

    def finish(self) -> None:
        self.told.append(("end", None))


@pytest.fixture
def told(monkeypatch) -> list[tuple[str, object]]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "noting", Noting)
    monkeypatch.setattr(Noting, "told", [])
    return Noting.told


@pytest.mark.parametrize("measured", [True, False])
def test_a_tracker_is_told_what_the_history_holds(toy_images, tmp_path, told, measured):
    result = finetune(
        network(), toy_images, toy_images if measured else None, recipe=QUICK, cpu=True,
        checkpoint=tmp_path, trackers=["noting"],
    )  # fmt: skip
    epochs = [(name, values) for name, values in told if name.startswith("epoch")]
    assert [name for name, _ in epochs] == ["epoch 1", "epoch 2", "epoch 3"]
    for (_, values), record in zip(epochs, result.history, strict=True):
        assert values["loss"] == record.loss
        assert values.get("accuracy") == record.accuracy
    assert epochs[-1][1]["lr"] == pytest.approx(0, abs=1e-9)
    assert dict(told)["config"]["batch_size"] == QUICK.batch_size
    assert told[0] == ("begin", ("prunezoo", str(tmp_path)))
    assert told[-1] == ("end", None)


def test_trackers_that_could_tell_nothing_are_refused_before_the_work(
    toy_images, tmp_path, told, monkeypatch, capsys
):
    with pytest.raises(ZooError, match="Did you mean 'tensorboard'"):
        finetune(network(), toy_images, None, trackers=["tensorbord"], checkpoint=tmp_path)
    with pytest.raises(ZooError, match="name a folder with checkpoint="):
        finetune(network(), toy_images, None, trackers=["noting"])
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ZooError, match="wandb is not installed: pip install wandb"):
        finetune(network(), toy_images, None, trackers=["wandb"], checkpoint=tmp_path)
    flags = ["--arch", "cnet", "--data", "digits", "--size", "8", "--track", "wandb"]
    assert main(["train", *flags, "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not told


def test_the_bar_shows_speed_loss_accuracy_and_the_time_left(toy_images, capsys):
    recipe = replace(QUICK, epochs=2)
    result = finetune(network(), toy_images, toy_images, recipe=recipe, progress=True, cpu=True)
    shown = capsys.readouterr().err
    assert re.search(r"\d+/192 \[\d+:\d+<\d+:\d+, +[\d.]+(img/s|s/img)", shown)
    last = result.history[-1]
    assert f"loss {last.loss:.3f}, val {last.accuracy:.2%}" in shown


def test_the_bar_counts_the_images_of_every_process_and_batch_sampler(toy_images, capsys):
    batches = DataLoader(toy_images, batch_sampler=BatchSampler(range(96), 16, drop_last=False))
    with progress_bar(batches, 2, 1, 3, show=True) as tell:
        tell(16, 0.5)
    assert "336/576" in capsys.readouterr().err
