"""Networks pruned and trained in threads, as a tuner with several jobs does, are those of one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import TensorDataset

import zoo

IMAGES = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(16) % 4)
RECIPE = replace(zoo.RECIPES["quick"], epochs=1, batch_size=4)


def network(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, classes),
    )  # fmt: skip


def in_threads(job: Callable[[int], dict], count: int = 4) -> list[dict]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(job, range(count)))


def test_networks_pruned_in_threads_are_those_of_one() -> None:
    networks = [network(4 + n) for n in range(4)]

    def prune(number: int) -> dict:
        return zoo.prune(networks[number], IMAGES[:2], cf=2, seed=number).state_dict()

    for got, expected in zip(in_threads(prune), map(prune, range(4)), strict=True):
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_networks_trained_in_threads_are_those_of_one() -> None:
    pruned = zoo.prune(network(), IMAGES[:2], cf=2)

    def train(seed: int) -> dict:
        model = copy.deepcopy(pruned)
        zoo.finetune(model, DATA, DATA, recipe=RECIPE, seed=seed, progress=False)
        return model.state_dict()

    for got, expected in zip(in_threads(train), map(train, range(4)), strict=True):
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_threads_that_prune_leave_the_process_and_a_shared_network_as_they_were() -> None:
    shared = network().train()
    before, state = copy.deepcopy(shared.state_dict()), torch.get_rng_state()
    filters = list(warnings.filters)

    def prune(number: int) -> dict:
        return [zoo.prune(shared, IMAGES[:2], cf=2, seed=n) for n in range(3)][
            number % 3
        ].state_dict()

    in_threads(prune, 6)
    assert warnings.filters == filters
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.training for layer in shared.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in shared.state_dict().items())
