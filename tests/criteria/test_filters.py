"""A filter is what computes one channel, along whichever dimension of the weight it lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from odd import IMAGES, Build, Net, conv, cut, halves, param
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo
from zoo.criteria.weight_scores import fpgm_scores, l1_scores, l2_scores
from zoo.tracing.graph import channel_groups

STRONG = (1, 2, 5, 7)
"""Of eight channels, those whose filters are planted to matter."""

DATA = TensorDataset(IMAGES.repeat(8, 1, 1, 1) + torch.rand(16, 3, 8, 8), torch.arange(16) % 4)


def up(inputs: int, outputs: int, kernel: int = 2, **options: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, kernel, kernel, **options)


def through(n: nn.Module, x: Tensor) -> Tensor:
    return n.head(n.last(n.middle(n.first(x)).relu()).relu().mean((2, 3)))


def matrix(n: nn.Module, x: Tensor) -> Tensor:
    rows = (n.first(x).relu().mean((2, 3)) @ n.w).relu()
    return n.head(rows)


BUILDS: dict[str, tuple[Build, str, str, int]] = {
    "read by a transposed one": (
        lambda: Net(through, first=conv(3, 8), middle=nn.BatchNorm2d(8), last=up(8, 6),
                    head=nn.Linear(6, 4)), "first", "first.weight", 0),
    "made by a transposed one": (
        lambda: Net(through, first=conv(3, 6), middle=up(6, 8), last=conv(8, 6),
                    head=nn.Linear(6, 4)), "middle", "middle.weight", 1),
    "made by one of another width": (
        lambda: Net(through, first=conv(3, 5), middle=up(5, 8), last=up(8, 3),
                    head=nn.Linear(3, 4)), "middle", "middle.weight", 1),
    "made by a stored matrix": (
        lambda: Net(matrix, first=conv(3, 6), w=param(6, 8), head=nn.Linear(8, 4)), "w", "w", 1),
}  # fmt: skip
"""Name -> a network, a group of eight channels, and the weight with its dimension of filters."""


def planted(name: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    build, group, weight, dim = BUILDS[name]
    module = build().eval()
    with torch.no_grad():  # what is positive stays so, and weak channels are dead after their ReLU
        for own, parameter in module.named_parameters():
            if not own.startswith("head"):
                parameter.zero_() if own.endswith("bias") else parameter.abs_()
        filters = dict(module.named_parameters())[weight].movedim(dim, 0)
        filters.uniform_(0.5, 1.0)
        for weak in set(range(8)).difference(STRONG):
            filters[weak] *= -1e-3
    return module, group


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor_weight", "obd", "snip", "synflow"])
def test_criteria_of_weights_keep_the_planted_channels(name: str, criterion: str) -> None:
    module, group = planted(name)
    profile = halves(channel_groups(module, IMAGES))
    plan = zoo.plan(module, IMAGES, profile=profile, criterion=criterion, data=DATA)
    assert plan.kept[group] == STRONG


@pytest.mark.parametrize("name", [name for name in BUILDS if "matrix" not in name])
@pytest.mark.parametrize("criterion", ["taylor", "fisher", "apoz"])
def test_criteria_of_outputs_keep_the_planted_channels(name: str, criterion: str) -> None:
    module, group = planted(name)
    profile = halves(channel_groups(module, IMAGES))
    plan = zoo.plan(module, IMAGES, profile=profile, criterion=criterion, data=DATA)
    assert plan.kept[group] == STRONG


@pytest.mark.parametrize("scores", [l1_scores, l2_scores, fpgm_scores])
def test_a_transposed_convolution_of_one_pixel_is_a_convolution(scores) -> None:
    """Its weight is the convolution's, transposed: so are its scores."""
    torch.manual_seed(0)
    plain = Net(through, first=conv(3, 6), middle=conv(6, 8, 1), last=conv(8, 6),
                head=nn.Linear(6, 4))  # fmt: skip
    turned = Net(through, first=plain.first, middle=up(6, 8, 1), last=plain.last, head=plain.head)
    with torch.no_grad():
        turned.middle.weight.copy_(plain.middle.weight.transpose(0, 1))
        turned.middle.bias.copy_(plain.middle.bias)
    torch.testing.assert_close(turned(IMAGES), plain(IMAGES))
    rows = [scores(n, channel_groups(n.eval(), IMAGES)) for n in (plain, turned)]
    for mine, theirs in zip(*rows, strict=True):
        assert mine == pytest.approx(theirs)


@pytest.mark.parametrize("name", BUILDS)
def test_they_are_cut_by_the_contract(name: str, tmp_path: Path) -> None:
    build, group, *_ = BUILDS[name]
    assert group in cut(build, tmp_path).pruning.plan.kept


def test_old_groups_without_dimensions_are_of_rows() -> None:
    groups = channel_groups(BUILDS["read by a transposed one"][0]().eval(), IMAGES)
    first = next(group for group in groups.groups if group.name == "first")
    assert (first.output_dims, [slot.dim for slot in first.filter_slots]) == ((), [0])
