"""Two processes over gloo train as one does that takes the same images per step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from toy import same, weights

from zoo.data.datasets import load_data
from zoo.models import build_model
from zoo.storage.checkpoints import HISTORY
from zoo.training.finetuning import finetune
from zoo.training.recipes import Recipe

RECIPE = Recipe(epochs=3, batch_size=20, lr=0.05, ema=0.5)


def digits(count: int) -> Dataset:
    return load_data("digits", size=8).train.subset(torch.arange(count))


def tensors(count: int) -> Dataset:
    images = digits(count)
    return TensorDataset(images.normalise(images.images), images.labels)


def normalised() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )


def cnet() -> nn.Module:
    return build_model("cnet", 10, image_size=8)


def normalising_images() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10))


CASES = {
    "cnet": (cnet, digits, {"batch_size": 40}),
    "cnet, any dataset": (cnet, tensors, {"batch_size": 40}),
    "batch norm": (normalised, digits, {"accumulate": 2}),
    "two batches each": (cnet, digits, {"batch_size": 80}),
    "statistics": (normalising_images, digits, {"batch_size": 40}),
}
"""Network, data, and how one process takes the images that two take."""


def trained(
    case: str, alone: bool, folder: Path | None = None, resume: bool = False
) -> tuple[list[float], nn.Module]:
    build, data, change = CASES[case]
    recipe = replace(RECIPE, **change) if alone else RECIPE
    if not alone and case == "two batches each":
        recipe = replace(RECIPE, accumulate=2)
    model = build()
    val = None if case == "statistics" else digits(50)
    result = finetune(
        model, data(170), val, recipe=recipe, checkpoint=folder, resume=resume, cpu=True
    )
    return [record.loss for record in result.history], model


def one_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    for number, case in enumerate(CASES):
        losses, model = trained(case, False, Path(folder, f"training {number}"))
        torch.save((losses, weights(model)), Path(folder, f"{case} {rank}.pt"))
    own = Path(folder, "nothing" if rank else "training 0")
    losses, model = trained("cnet", False, own, resume=True)
    torch.save((losses, weights(model)), Path(folder, f"resumed {rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(folder)), nprocs=2)
    return folder


@pytest.mark.slow
def test_a_process_without_the_savepoint_goes_on_with_the_first_ones(pair):
    for rank in (0, 1):
        (losses, own), (resumed, same_weights) = (
            torch.load(pair / f"{name} {rank}.pt", weights_only=True)
            for name in ("cnet", "resumed")
        )
        assert resumed == losses
        assert same(own, same_weights)


@pytest.mark.slow
def test_running_statistics_are_of_the_images_of_both_processes(pair):
    """The mean of a batch is that of its halves', and so is what runs after it."""
    own, other = (torch.load(pair / f"statistics {n}.pt", weights_only=True)[1] for n in (0, 1))
    assert same(own, other)
    _, alone = trained("statistics", True)
    assert torch.allclose(own["0.running_mean"], alone[0].running_mean, atol=1e-6)
    assert not torch.allclose(alone[0].running_mean, torch.zeros(3), atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "statistics"])
def test_two_processes_have_the_losses_of_one(pair, case):
    (losses, own), (other_losses, other) = (
        torch.load(pair / f"{case} {rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert losses == other_losses
    assert same(own, other)
    alone, _ = trained(case, True)
    assert losses == pytest.approx(alone, abs=1e-5)
    assert losses[0] > losses[-1]
    history = pair / f"training {list(CASES).index(case)}" / HISTORY
    assert [json.loads(line)["loss"] for line in history.read_text().splitlines()] == losses


@pytest.mark.slow
def test_the_command_line_under_accelerate_launch_trains_as_one_process_does(tmp_path):
    """Nothing but the launcher joins the processes: a machine without CUDA must not hinder that."""
    text = "epochs = 2\nlr = 0.05\nbatch_size = {}\n"
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launcher += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launcher += ["--main_process_port=0"]
    told = {}
    for name, batch, start in (("two", 100, launcher), ("one", 200, [])):
        Path(tmp_path, f"{name}.toml").write_text(text.format(batch))
        arguments = ["-m", "zoo", "train", "--arch", "cnet", "--data", "digits", "--size", "8"]
        arguments += ["--recipe", f"{name}.toml", "--out", f"{name}.safetensors"]
        done = subprocess.run(
            [sys.executable, *start, *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        told[name] = done.stdout.splitlines()
    assert [line for line in told["two"] if "Wrote" in line] == ["Wrote two.safetensors"]
    two, one = (
        [json.loads(line) for line in (tmp_path / f"{name}.safetensors.training" / HISTORY).open()]
        for name in ("two", "one")
    )
    assert [record["loss"] for record in two] == pytest.approx(
        [record["loss"] for record in one], abs=1e-5
    )
