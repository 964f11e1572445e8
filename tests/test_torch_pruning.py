"""Torch-Pruning as an independent oracle: the same kept indices give the same network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning
from test_pruning import planned, traced
from torch import nn

from zoo.groups import ChannelGroups
from zoo.pruning import surgery
from zoo.pruning.plan import Plan
from zoo.pruning.surgery import named_tensors

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


def cut_by_torch_pruning(
    module: nn.Module, groups: ChannelGroups, plan: Plan, x: torch.Tensor
) -> nn.Module:
    """A copy of `module` in which Torch-Pruning has cut what `plan` cuts.

    It is told the indices of one layer per channel group, and has to find the rest by itself.
    """
    result = copy.deepcopy(module)
    graph = torch_pruning.DependencyGraph().build_dependency(result, x, verbose=False)
    for group in groups.groups:
        filters = group.filters[0]
        rows = [slot for slot in group.slots if (slot.tensor, slot.dim) == (filters, 0)]
        removed = set(range(group.size)).difference(plan.kept[group.name])
        gone = [position for slot in rows for unit in removed for position in slot.positions(unit)]
        layer = result.get_submodule(filters.removesuffix(".weight"))
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, cut, gone).prune()
    return result


@pytest.mark.parametrize("name", AGREEING)
def test_the_same_indices_give_the_same_network(name: str) -> None:
    module, x, groups = traced(name)
    plan = planned(module, groups, "equal", "random", cf=2.0)
    ours = surgery.apply(module, groups, plan)
    theirs = cut_by_torch_pruning(module, groups, plan, x)
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
