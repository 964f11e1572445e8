"""Two processes over gloo train as one does that takes the same images per step."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import same, weights
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from zoo.data import load_data
from zoo.models import build_model
from zoo.recipes import Recipe
from zoo.savepoints import HISTORY
from zoo.training import finetune

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


CASES = {
    "cnet": (cnet, digits, {"batch_size": 40}),
    "cnet, any dataset": (cnet, tensors, {"batch_size": 40}),
    "batch norm": (normalised, digits, {"accumulate": 2}),
    "two batches each": (cnet, digits, {"batch_size": 80}),
}
"""Network, data, and how one process takes the images that two take."""


def trained(case: str, alone: bool, folder: Path | None = None) -> tuple[list[float], nn.Module]:
    build, data, change = CASES[case]
    recipe = replace(RECIPE, **change) if alone else RECIPE
    if not alone and case == "two batches each":
        recipe = replace(RECIPE, accumulate=2)
    model = build()
    result = finetune(model, data(170), digits(50), recipe=recipe, checkpoint=folder, cpu=True)
    return [record.loss for record in result.history], model


def one_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    for number, case in enumerate(CASES):
        losses, model = trained(case, False, Path(folder, f"training {number}"))
        torch.save((losses, weights(model)), Path(folder, f"{case} {rank}.pt"))
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
@pytest.mark.parametrize("case", CASES)
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
