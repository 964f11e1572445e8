"""Every policy's contract on networks of timm and torchvision that have no profile."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import zoo
from zoo.models import build_model
from zoo.planning import best
from zoo.planning.learned import LEARNED
from zoo.planning.policies import POLICIES
from zoo.planning.rankings import RANKINGS
from zoo.planning.request import planned, request
from zoo.tracing.known_groups import traced_groups

NETWORKS = (
    "torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:squeezenet1_1",
    "timm:resnet18d", "timm:mobilenetv3_small_050", "timm:regnetx_002",
)  # fmt: skip
X = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, torch.arange(8) % 10)
UNREACHABLE = ("decreasing", "residual-dense", "global-bn")
"""The first keeps the last groups whole, the second all that a stream joins; the third needs a
batch norm after every group."""


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    module = build_model(request.param, 10, image_size=64)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):  # no two channels score alike
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return module.eval()


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_every_policy_meets_the_factor_and_leaves_the_network_alone(
    network: nn.Module, metric: str
) -> None:
    before = copy.deepcopy(network.state_dict())
    groups = traced_groups(network, (X[:1],))[1]
    for name in (*POLICIES, *RANKINGS, LEARNED):
        if name in UNREACHABLE:
            continue
        asked = request(name, cf=2, metric=metric, seed=3)
        plan = planned(network, groups, asked, DATA)
        assert plan.got == pytest.approx(2, rel=0.01), name
        if name in ("random", "greedy", "global", "knapsack", LEARNED):
            assert plan == planned(network, groups, asked, DATA), name
    assert planned(network, groups, asked, None).got == pytest.approx(2, rel=0.01)
    assert all(torch.equal(before[name], own) for name, own in network.state_dict().items())


def test_best_prunes_it_with_and_without_images(network: nn.Module) -> None:
    for data in (None, DATA):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pruned = zoo.prune(network, X[:1], cf=3, metric="macs", data=data)
        assert pruned.pruning.plan.profile in best.best_policies("macs", 3, data=data is not None)
        assert pruned.pruning.plan.got == pytest.approx(3, rel=0.01)
        assert pruned(X).shape == (8, 10)
