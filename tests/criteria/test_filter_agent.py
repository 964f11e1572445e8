"""The filter agent on networks whose decisive channels are known."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo
from zoo.criteria.filter_agent import FilterAgent, reinforce_scores
from zoo.errors import DataError, ZooError
from zoo.spec.groups import ChannelGroups
from zoo.surgery.surgery import named_tensors
from zoo.tracing.graph import channel_groups

SHORT = FilterAgent(updates=6, samples=3)

FIRST, SECOND = [1, 4, 6], [2, 3, 7]
"""The channels of the two convolutions of `Colours` that carry red, green and blue."""


class Colours(nn.Module):
    """The class is the brightest of three colours; of 8 + 8 channels only six carry any colour.

    The others have larger weights and are read by nothing that reaches the logits.
    """

    def __init__(self, copied: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in (*self.conv1.parameters(), *self.conv2.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            for conv, carriers in ((self.conv1, FIRST), (self.conv2, SECOND)):
                conv.weight[carriers], conv.bias[carriers] = 0, 0
            self.fc.weight.zero_()
            self.fc.bias.zero_()
            for colour, (one, two) in enumerate(zip(FIRST, SECOND, strict=True)):
                self.conv1.weight[one, colour] = 0.5
                self.conv2.weight[two, one] = 0.5
                self.fc.weight[colour, two] = 1
            if copied:  # channel 0 becomes another red one
                self.conv1.weight[0], self.conv1.bias[0] = self.conv1.weight[1], 0
                self.conv2.weight[:, 0] = self.conv2.weight[:, 1]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


class Sum(nn.Module):
    """Two convolutions whose sum's channels 2, 5 and 7 carry the colours, some by either one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 9, 1, bias=False), nn.Conv2d(3, 9, 1, bias=False)
        self.fc = nn.Linear(9, 3, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for colour, (channel, layer) in enumerate(
                ((2, self.left), (5, self.right), (7, self.right))
            ):
                self.fc.weight[:, channel] = 0
                self.fc.weight[colour, channel] = 1
                for conv in (self.left, self.right):
                    conv.weight[channel] = 0
                layer.weight[channel, colour] = 0.5
            rest = [0, 1, 3, 4, 6, 8]
            self.fc.weight[:, rest] = 0.1  # the same for all classes
            for conv in (self.left, self.right):
                conv.weight[rest] = torch.randn((6, 3, 1, 1), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.left(x) + self.right(x)).mean((2, 3)))


def coloured(count: int = 96) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 3
    images = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.6
    images[torch.arange(count), labels] += 0.4
    return images, labels


IMAGES, LABELS = coloured()


def grouped(module: nn.Module) -> tuple[nn.Module, ChannelGroups]:
    module.eval()
    assert (module(IMAGES).argmax(1) == LABELS).float().mean() > 0.9
    return module, channel_groups(module, IMAGES[:1])


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=scores.__getitem__)[-count:])


@pytest.mark.parametrize("seed", range(2))
def test_the_decisive_channels_come_first(seed):
    module, groups = grouped(Colours())
    scores = reinforce_scores(module, groups, seed, [(IMAGES, LABELS)])
    assert [best(row, 3) for row in scores] == [FIRST, SECOND]
    for row, decisive in zip(scores, (FIRST, SECOND), strict=True):
        others = [p for unit, p in enumerate(row) if unit not in decisive]
        assert 0 <= max(others) < 0.5 < min(row[unit] for unit in decisive) <= 1


def test_of_two_copies_one_stays():
    """No criterion that judges each channel by itself can do it: their scores are equal."""
    module, groups = grouped(Colours(copied=True))
    first, _ = reinforce_scores(module, groups, 0, [(IMAGES, LABELS)])
    assert best(first, 3) in ([1, 4, 6], [0, 4, 6])
    assert min(first[0], first[1]) < 0.5 < max(first[0], first[1])


def test_a_channel_that_several_layers_produce_is_one_decision():
    module, groups = grouped(Sum())
    (group,) = groups.groups
    assert len(group.filters) == 2
    (scores,) = reinforce_scores(module, groups, 0, [(IMAGES, LABELS)])
    assert best(scores, 3) == [2, 5, 7]


def test_where_no_channel_matters_all_are_given_up():
    module = Colours().eval()
    nn.init.zeros_(module.fc.weight)
    groups = channel_groups(module, IMAGES[:1])
    for row in reinforce_scores(module, groups, 0, [(IMAGES, LABELS)]):
        assert sum(row) / len(row) < 0.3 < FilterAgent().start


def test_the_plan_decides_how_many_and_the_agent_which():
    module, _ = grouped(Colours())
    data = TensorDataset(IMAGES, LABELS)
    plans = {
        criterion: zoo.plan(module, IMAGES[:1], cf=3.0, criterion=criterion, data=data)
        for criterion in ("l1", "reinforce")
    }
    assert plans["reinforce"].widths == plans["l1"].widths
    width = plans["reinforce"].widths["conv1"]
    assert width >= 3
    assert set(FIRST) <= set(plans["reinforce"].kept["conv1"])
    assert not set(FIRST) <= set(plans["l1"].kept["conv1"])
    pruned = zoo.prune(module, IMAGES[:1], cf=3.0, criterion="reinforce", data=data)
    assert torch.equal(pruned(IMAGES).argmax(1), module(IMAGES).argmax(1))


def test_the_network_its_modes_and_the_random_state_stay_as_they_were():
    module, groups = grouped(Colours())
    module.train()
    module.conv1.eval()
    module.conv2.weight.requires_grad_(False)
    before, state = copy.deepcopy(module), torch.get_rng_state()
    reinforce_scores(module, groups, 0, [(IMAGES, LABELS)], SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in named_tensors(module).items():
        assert torch.equal(tensor, named_tensors(before)[name]), name
    for old, new in zip(before.modules(), module.modules(), strict=True):
        assert old.training == new.training
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (name != "conv2.weight")
        assert parameter.grad is None


def test_a_seed_repeats_and_another_does_not():
    module, groups = grouped(Colours())

    def scores(seed: int) -> list[list[float]]:
        with torch.no_grad():
            return reinforce_scores(module, groups, seed, [(IMAGES, LABELS)], SHORT)

    first = scores(0)
    torch.rand(7)
    assert scores(0) == first
    assert all(a != b for a, b in zip(first, scores(1), strict=True))


def test_a_group_is_judged_in_the_whole_network_whatever_came_before():
    module, groups = grouped(Colours())
    every = reinforce_scores(module, groups, 0, [(IMAGES, LABELS)], SHORT)
    alone = replace(groups, groups=groups.groups[1:])
    assert reinforce_scores(module, alone, 0, [(IMAGES, LABELS)], SHORT) == every[1:]


def test_the_settings_bound_the_forward_passes():
    module, groups = grouped(Colours())
    sizes: list[int] = []
    module.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))

    def passes(settings: FilterAgent) -> list[int]:
        sizes.clear()
        reinforce_scores(module, groups, 0, [(IMAGES, LABELS)], settings)
        return list(sizes)

    never = replace(SHORT, certainty=1.1, images=40)
    # the whole network on each part, then two groups of six updates of three masked ones
    assert passes(never) == [40, 40, 16] + [n for n in [40, 40, 16] * 2 for _ in range(3)] * 2
    assert len(passes(replace(SHORT, certainty=0.5))) == 2
    long = FilterAgent(updates=200, certainty=0.9)
    assert len(passes(long)) < 2 * long.updates * long.samples


def test_bad_data_is_an_error():
    module, groups = grouped(Colours())
    with pytest.raises(ZooError, match="'reinforce' needs data"):
        reinforce_scores(module, groups, 0, [])
    with pytest.raises(DataError, match="3"):
        reinforce_scores(module, groups, 0, [(IMAGES, LABELS + 1)])
