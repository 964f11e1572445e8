"""The knapsack finds the widths worth most within a budget, and says how far it can be off."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import FactorError
from zoo.planning.knapsack import _Problem, knapsack_solution
from zoo.planning.rankings import RANKINGS, ranking_solution
from zoo.planning.solver import FREE, Limits
from zoo.registry.store import stored_groups
from zoo.spec.cost import CostModel, CostTerm, Extent, LayerTimes, TimedLayer, cost_model

SIZES = (6, 5, 7, 4)


def chain(sizes: tuple[int, ...]) -> CostModel:
    """A stem, layers from each group to the next, a shortcut from the first to the last, a head."""
    last = len(sizes) - 1
    pairs = [(n, n + 1) for n in range(last)]
    terms = [CostTerm(pair, 9, 9 * 4 ** (last - n)) for n, pair in enumerate(pairs)]
    terms += [CostTerm((0,), 27, 900), CostTerm((0, last), 1, 3), CostTerm((last,), 10, 10)]
    return CostModel(sizes, tuple(terms))


def scores_of(sizes: tuple[int, ...], seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    return [[draw.random() ** 3 for _ in range(size)] for size in sizes]


def problem(scores: list[list[float]], model: CostModel, metric: str) -> _Problem:
    return _Problem(scores, model, metric, FREE)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(1.2, 6), st.sampled_from(["params", "macs"]))
def test_nothing_within_the_budget_is_worth_more_than_the_gap_says(
    seed: int, cf: float, metric: str
) -> None:
    model, scores = chain(SIZES), scores_of(SIZES, seed)
    found = knapsack_solution(scores, model, cf, metric)
    own = problem(scores, model, metric)
    budget = own.cost(found.solution.widths)
    best = max(
        own.value(widths)
        for widths in itertools.product(*(range(1, size + 1) for size in SIZES))
        if own.cost(widths) <= budget
    )
    worth = own.value(found.solution.widths)
    assert worth <= best + 1e-9
    assert best <= worth * (1 + found.gap) + 1e-9


@pytest.mark.parametrize(
    "name", ["resnet20-16", "torchvision:resnet50", "torchvision:mobilenet_v2"]
)
@pytest.mark.parametrize("metric", ["params", "macs"])
def test_on_real_networks_it_is_near_the_bound_and_above_every_ranking(
    name: str, metric: str
) -> None:
    groups = stored_groups(name)
    assert groups is not None
    model, scores = cost_model(groups), scores_of(groups.sizes, 0)
    found = knapsack_solution(scores, model, 4, metric)
    assert found.solution.got == pytest.approx(4, rel=0.01)
    assert found.gap < 0.01
    own = problem(scores, model, metric)
    worth = own.value(found.solution.widths)
    for other in ("global", "global-per-cost"):
        rival = ranking_solution(RANKINGS[other], scores, model, 4, metric)
        assert worth > own.value(rival.widths) * (1 - 0.01)
    assert worth > own.value(ranking_solution(RANKINGS["global"], scores, model, 4, metric).widths)


def test_where_too_many_groups_share_a_layer_there_is_no_bound_but_good_widths() -> None:
    sizes = (16,) * 12
    terms = tuple(CostTerm(pair, 9, 9) for pair in itertools.combinations(range(12), 2))
    model, scores = CostModel(sizes, terms), scores_of(sizes, 1)
    found = knapsack_solution(scores, model, 3)
    assert found.gap == math.inf
    assert found.solution.got == pytest.approx(3, rel=0.01)
    own = problem(scores, model, "params")
    rival = ranking_solution(RANKINGS["global-per-cost"], scores, model, 3)
    assert own.value(found.solution.widths) > 0.99 * own.value(rival.widths)


def test_measured_latency_is_a_budget_too() -> None:
    sizes = (16, 16)
    stairs = tuple(0.5 * math.ceil(width / 8) for width in range(1, 17))  # cheap in eights
    widths = tuple(range(1, 17))
    table = LayerTimes("b.weight", widths, widths, tuple((ms,) * 16 for ms in stairs))
    layer = TimedLayer(Extent(0, ((1, 1),)), Extent(0, ((0, 1),)), table)
    first = LayerTimes("a.weight", widths, (3,), tuple((ms,) for ms in stairs))
    model = CostModel(
        sizes,
        (CostTerm((0,), 27, 27), CostTerm((0, 1), 9, 9)),
        (TimedLayer(Extent(0, ((0, 1),)), Extent(3), first), layer),
    )
    flat = [[1.0] * 16, [1.0] * 16]
    found = knapsack_solution(flat, model, 2, "latency")
    assert found.solution.widths == (8, 8)  # the end of a step: nothing cheaper keeps as much


def test_limits_hold_and_what_is_out_of_reach_is_said() -> None:
    model, scores = chain((32, 16, 32)), scores_of((32, 16, 32), 2)
    limits = Limits(align=8, pinned={1: 16}, floor=0.5)
    widths = knapsack_solution(scores, model, 1.4, limits=limits).solution.widths
    assert widths[1] == 16
    assert all(width % 8 == 0 and width >= 16 for width in widths)
    with pytest.raises(FactorError, match="cannot be reached"):
        knapsack_solution(scores, model, 1000)
    zero = knapsack_solution([[0.0] * 32, [0.0] * 16, [0.0] * 32], model, 2)
    assert zero.solution.got == pytest.approx(2, rel=0.01)
    assert zero.gap == 0
