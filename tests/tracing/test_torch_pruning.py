"""Torch-Pruning as an independent oracle: the same kept indices give the same network."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import planned, traced
from rival import cut

from zoo.surgery import surgery
from zoo.surgery.surgery import named_tensors

AGREEING = (
    "resnet20-16",
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:vgg16_bn",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
    "torchvision:efficientnet_b0",
    "timm:regnetx_002",
    "timm:regnety_002",
    "timm:resnet18",
    "timm:seresnet18",
)


@pytest.mark.parametrize("name", AGREEING)
def test_the_same_indices_give_the_same_network(name: str) -> None:
    module, x, groups = traced(name)
    plan = planned(module, groups, cf=2.0)
    ours = surgery.apply(module, groups, plan)
    theirs = cut(copy.deepcopy(module), groups, plan, x)
    expected = named_tensors(theirs)
    assert {k: t.shape for k, t in named_tensors(ours).items()} == {
        k: t.shape for k, t in expected.items()
    }
    for key, tensor in named_tensors(ours).items():
        assert torch.equal(tensor, expected[key]), key
    with torch.no_grad():
        difference, scale = (ours(x) - theirs(x)).abs().max(), theirs(x).abs().max()
    assert scale > 0
    assert difference <= 1e-9 * max(1.0, scale.item())
