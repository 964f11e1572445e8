"""Channels of all groups ranked together: the highest stay, the factor is met."""

from __future__ import annotations

import copy
from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from odd import Net, conv
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import zoo
from zoo.criteria.scores import CRITERIA
from zoo.errors import DataError, GraphError, ZooError
from zoo.models import build_model
from zoo.planning.rankings import (
    RANKINGS,
    Ranking,
    _rank_curve,
    by_mean,
    by_those_above,
    ranking_solution,
)
from zoo.spec.cost import cost_model
from zoo.tracing.graph import channel_groups

scores = st.lists(
    st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=12),
    min_size=1,
    max_size=6,
)


@given(scores, st.floats(0, 1))
def test_the_best_channels_stay_wherever_they_are(own: list[list[float]], t: float) -> None:
    kept = [
        round(ratio * len(group)) for ratio, group in zip(_rank_curve(own)(t), own, strict=True)
    ]
    everyone = sorted((score for group in own for score in group), reverse=True)
    best = everyone[: int(t * len(everyone))]
    threshold = best[-1] if best else float("inf")
    for group, count in zip(own, kept, strict=True):
        above = sum(score > threshold for score in group)
        level = sum(score == threshold for score in group)
        assert max(1, above) <= count <= max(1, above + level)
    taken = sum(count for group, count in zip(own, kept, strict=True) if max(group) >= threshold)
    assert taken >= len(best)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=9), st.floats(0.01, 100))
def test_normalised_scores_do_not_depend_on_the_groups_scale(
    group: list[float], scale: float
) -> None:
    for normalise in (by_mean, by_those_above):
        scaled = normalise([scale * score for score in group])
        assert scaled == pytest.approx(normalise(group), rel=1e-6)
    assert sum(by_mean(group)) == pytest.approx(len(group))
    assert max(by_those_above(group)) == 1.0


def two_groups() -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        return n.head(n.b(n.a(x).relu()).relu().mean((2, 3)))

    return Net(run, a=conv(3, 16), b=conv(16, 16), head=nn.Linear(16, 4))


DATA = TensorDataset(
    torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4
)


@pytest.mark.parametrize("name", ["global", "global-fisher", "global-l2"])
def test_channels_that_do_nothing_go_first(name: str) -> None:
    module = two_groups()
    with torch.no_grad():
        for tensor in (module.a.weight, module.a.bias):
            tensor[4:] = 0.0
    plan = zoo.plan(module, DATA[:1][0], cf=3.0, profile=name, data=DATA, criterion="l1")
    assert set(plan.kept["a"][:4]) == {0, 1, 2, 3}
    assert len(plan.kept["a"]) <= 5  # one more, where the factor asks for it
    assert len(plan.kept["b"]) > 8


def test_equal_scores_per_cost_are_cut_where_a_channel_costs_most() -> None:
    module = two_groups()
    groups = channel_groups(module, DATA[:1][0])
    model = cost_model(groups)
    flat = [[1.0] * 16, [1.0] * 16]
    costs = [model.marginal(model.sizes, group).params for group in range(2)]
    solution = ranking_solution(Ranking("l1", per_cost=True), flat, model, 1.5)
    cheap = min(range(2), key=lambda group: costs[group])
    assert solution.widths[cheap] > solution.widths[1 - cheap]


@pytest.mark.parametrize(("name", "metric"), zip(RANKINGS, cycle(["params", "macs"])))
def test_the_factor_is_met_again_and_again_and_nothing_is_edited(name: str, metric: str) -> None:
    module = build_model("resnet20-16", 4)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):  # an untrained network has nothing to rank
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    before = copy.deepcopy(module.state_dict())
    data = TensorDataset(torch.rand(32, 3, 16, 16), torch.arange(32) % 4)

    def plan(**options: object) -> zoo.Plan:
        return zoo.plan(
            module, data[:1][0], cf=4, metric=metric, profile=name, data=data, **options
        )

    first = plan()
    assert first == plan()
    assert first.got == pytest.approx(4, rel=0.01)
    assert first.profile == name
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert {len(units) % 8 for units in plan(align=8).kept.values()} == {0}


def test_steps_end_at_the_widths_of_the_ranking() -> None:
    module = two_groups()
    schedule = zoo.Schedule(cf=2, steps=2, profile="global", recipe=zoo.Recipe(epochs=1, lr=1e-6))
    result = zoo.prune_iteratively(module, DATA, DATA, schedule, example_input=DATA[:1][0])
    whole = zoo.plan(module, DATA[:1][0], cf=2, profile="global", data=DATA)
    assert result.model.pruning.plan.widths == whole.widths


def test_a_ranking_by_data_says_that_it_needs_them() -> None:
    module = two_groups()
    for name, ranking in RANKINGS.items():
        if CRITERIA[ranking.criterion].needs_data:
            with pytest.raises(ZooError, match=f"policy '{name}' ranks .* needs data: pass data="):
                zoo.plan(module, DATA[:1][0], cf=2, profile=name)
    with pytest.raises(GraphError, match="needs a batch norm"):
        zoo.plan(module, DATA[:1][0], cf=2, profile="global-bn")
    with pytest.raises(ZooError, match="global-lamp"):
        zoo.plan(module, DATA[:1][0], cf=2, profile="globl")


@pytest.mark.parametrize("name", RANKINGS)
def test_numbers_that_are_none_are_never_ranked(name: str) -> None:
    module = build_model("resnet20-16", 4)
    images = torch.rand(32, 3, 16, 16)
    data = TensorDataset(images, torch.arange(32) % 4)
    options = {"cf": 4, "profile": name, "data": data}
    with torch.no_grad():
        for broken in (module.layer1[0].conv1.weight, module.layer1[0].bn1.weight):
            broken[0] = torch.nan
    with pytest.raises(ZooError, match="not finite"):
        zoo.plan(module, torch.rand(1, 3, 16, 16), **options)
    if CRITERIA[RANKINGS[name].criterion].needs_data:
        images[3] = torch.nan
        with pytest.raises(ZooError, match="not finite: the images or the weights"):
            zoo.plan(build_model("resnet20-16", 4), torch.rand(1, 3, 16, 16), **options)


def test_data_of_every_integer_type_rank_alike_and_other_data_are_one_error() -> None:
    module, example = two_groups(), DATA[:1][0]
    images, labels = DATA.tensors
    options = {"cf": 2, "profile": "global"}
    expected = zoo.plan(module, example, data=DATA, **options)
    for dtype in (torch.int32, torch.uint8):
        plan = zoo.plan(module, example, data=TensorDataset(images, labels.to(dtype)), **options)
        assert plan.widths == expected.widths
    uneven = [(torch.rand(3, 8 + n % 2, 8), 0) for n in range(4)]
    pictures = [(object(), 0)] * 4
    for data in (uneven, pictures):
        with pytest.raises(DataError, match="do not make a batch"):
            zoo.plan(module, example, data=DataLoader(data, 4), **options)
        with pytest.raises(DataError, match=r"several shapes|The images are object, not tensors"):
            zoo.plan(module, example, data=Listed(data), **options)
    integers = TensorDataset((images * 255).byte(), labels)
    for data in (integers, DataLoader(integers, 4)):
        with pytest.raises(DataError, match=r"images are torch\.uint8, not floats"):
            zoo.plan(module, example, data=data, **options)


class Listed(Dataset):
    """Of the samples in a list; of None, it fails as a disk does."""

    def __init__(self, samples: list) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> object:
        if self.samples[number] is None:
            raise RuntimeError("the disk is full")
        return self.samples[number]


def test_what_a_data_set_raises_of_its_own_is_not_taken_for_its_images() -> None:
    with pytest.raises(RuntimeError, match=r"^the disk is full$"):
        zoo.plan(two_groups(), DATA[:1][0], cf=2, profile="global", data=Listed([None] * 4))


def test_a_layer_whose_weight_is_used_without_it_is_named() -> None:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        x = functional.conv2d(x, n.a.weight, n.a.bias, padding=1).relu()
        return n.head(n.b(x).relu().mean((2, 3)))

    module = Net(run, a=conv(3, 16), b=conv(16, 16), head=nn.Linear(16, 4))
    assert zoo.plan(module, DATA[:1][0], cf=2, profile="global-l2").widths["a"] < 16
    with pytest.raises(ZooError, match="layer 'a' is not called"):
        zoo.plan(module, DATA[:1][0], cf=2, profile="global", data=DATA)


def test_a_network_of_two_inputs_needs_a_policy_without_data() -> None:
    def run(n: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return n.head((n.a(x) + n.b(y)).relu().mean((2, 3)))

    module = Net(run, a=conv(3, 16), b=conv(3, 16), head=nn.Linear(16, 4))
    x = DATA[:1][0]
    with pytest.raises(DataError, match="does not run on images"):
        zoo.plan(module, (x, x), cf=2, profile="global", data=DATA)
    assert zoo.plan(module, (x, x), cf=2, profile="global-l2").got == pytest.approx(2, rel=0.03)


def test_a_network_whose_channels_all_score_zero_is_not_ranked() -> None:
    module = Net(lambda n, x: n.head(n.a(x).mean((2, 3))), a=conv(3, 16), head=nn.Linear(16, 4))
    nn.init.zeros_(module.head.weight)
    with pytest.raises(GraphError, match="score the same by 'taylor'"):
        zoo.plan(module, DATA[:1][0], cf=2, profile="global", data=DATA)
    assert zoo.plan(module, DATA[:1][0], cf=2, profile="global-l2").widths["a"] < 16
