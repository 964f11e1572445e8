"""The knapsack of channels: the widths that keep the most saliency within a budget.

A group of width w is worth the sum of its w highest scores. Costs are sums over layers of products
of two or three widths, so this is a quadratic knapsack. For a price λ of one unit of cost,
Σ value - λ · cost is maximised exactly over a grid of widths by eliminating one group after the
other, because few groups share a layer. The price is bisected until the budget is met (the dual of
Aflalo et al., 2020, "Knapsack Pruning with Inner Distillation", and Shen et al., 2022, "HALP",
which both make the cost linear instead). What is left of the budget is filled greedily.

The same dual, with every value rounded up and every cost rounded down to the grid, bounds the value
of any widths within the budget: the *gap* is how far from it the widths can be at most.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zoo.criteria.weight_scores import Scores
from zoo.planning.solver import FREE, Limits, Solution, allowed_widths, meet, round_widths
from zoo.spec.cost import CostModel

__all__ = ["Knapsack", "knapsack_solution"]

GRIDS = (64, 32, 16, 8)
"""Widths of a group that are tried, at most; the first whose tables fit."""

CELLS = 300_000
"""Of the largest table of an elimination."""

BISECTIONS = 40

Widths = tuple[int, ...]


@dataclass(frozen=True)
class Knapsack:
    """What was found.

    Attributes:
        solution: the widths, and the factor asked for and met.
        gap: no widths of at most this cost are worth more than (1 + gap) times as much; infinite
            where too many groups share a layer (DenseNet) for a bound.
    """

    solution: Solution
    gap: float


def knapsack_solution(
    scores: Scores,
    model: CostModel,
    cf: float,
    metric: str = "params",
    limits: Limits = FREE,
) -> Knapsack:
    """The widths within `limits` of the largest sum of kept scores at factor `cf` of `metric`.

    Args:
        scores: one list per group, one number of at least 0 per channel.
        model: the costs as functions of widths.
        cf, metric, limits: as in `zoo.planning.solver.solve`.

    Raises:
        FactorError: when the factor is out of reach.
    """
    problem = _Problem(scores, model, metric, limits)
    budget = model.total(model.sizes, metric) / cf
    smallest, largest = problem.smallest, problem.largest
    below, price = smallest, 0.0
    if problem.cost(smallest) <= budget:
        below, price = problem.within(budget)
    above = problem.stepped(below) or below
    widths = meet(model, cf, metric, limits, (smallest, below, above, largest))
    ratios = tuple(width / size for width, size in zip(widths, model.sizes, strict=True))
    solution = Solution(widths, ratios, cf, model.factor(widths, metric))
    bound = problem.bound(price, problem.cost(widths))
    worth = problem.value(widths)
    return Knapsack(solution, max(0.0, bound / worth - 1) if worth else 0.0)


class _Problem:
    """Values and costs over the widths that the limits allow."""

    def __init__(self, scores: Scores, model: CostModel, metric: str, limits: Limits) -> None:
        self.model, self.metric, self.limits = model, metric, limits
        best_first = (sorted(own, reverse=True) for own in scores)
        self.values = [np.concatenate(([0.0], np.cumsum(own))) for own in best_first]
        ones = [1.0] * len(model.sizes)
        self.smallest = round_widths(model.sizes, [0.0] * len(ones), limits)
        self.largest = round_widths(model.sizes, ones, limits)

    def cost(self, widths: Sequence[int]) -> float:
        return self.model.total(widths, self.metric)

    def value(self, widths: Sequence[int]) -> float:
        return float(sum(own[width] for own, width in zip(self.values, widths, strict=True)))

    def ladder(self, group: int) -> list[int]:
        """All widths that a group may have."""
        return allowed_widths(self.smallest[group], self.largest[group], self.limits.align)

    # --- one price --------------------------------------------------------------------------------

    @cached_property
    def grids(self) -> list[list[int]] | None:
        """The widths tried per group; None where the tables of an elimination would not fit."""
        ladders = [self.ladder(group) for group in range(len(self.values))]
        for count in GRIDS:
            grids = [_thinned(own, count) for own in ladders]
            if self._largest_table([len(grid) for grid in grids]) <= CELLS:
                return grids
        return None

    @cached_property
    def scopes(self) -> list[tuple[int, ...]]:
        """The sets of groups whose widths a term of the cost multiplies."""
        if self.metric == "latency":
            return [tuple(sorted(layer.groups)) for layer in self.model.timed or ()]
        return [tuple(sorted(set(term.groups))) for term in self.model.terms]

    def _largest_table(self, counts: list[int]) -> int:
        largest = 1
        scopes = [set(scope) for scope in self.scopes if scope]
        for group in self._order(counts):
            joined = set().union(*(scope for scope in scopes if group in scope), {group})
            largest = max(largest, math.prod(counts[index] for index in joined))
            if largest > CELLS:
                break
            scopes = [scope for scope in scopes if group not in scope] + [joined - {group}]
        return largest

    def _order(self, counts: list[int]) -> list[int]:
        """An order to eliminate the groups in, the one whose table is smallest first."""
        near: list[set[int]] = [set() for _ in counts]
        for scope in self.scopes:
            for one, other in itertools.permutations(scope, 2):
                near[one].add(other)
        left, order = set(range(len(counts))), list[int]()
        while left:
            group = min(left, key=lambda g: (math.prod(counts[n] for n in near[g]), g))
            for one, other in itertools.permutations(near[group], 2):
                near[one].add(other)
            for other in near[group]:
                near[other].discard(group)
            left.remove(group)
            order.append(group)
        return order

    @cached_property
    def order(self) -> list[int]:
        assert self.grids is not None
        return self._order([len(grid) for grid in self.grids])

    @cached_property
    def tables(self) -> list[tuple[tuple[int, ...], np.ndarray]]:
        """(groups, their part of the cost at every combination of the grids' widths)."""
        assert self.grids is not None
        merged: dict[tuple[int, ...], np.ndarray] = {}
        if self.metric == "latency":
            dense = list(self.model.sizes)
            for scope, layer in zip(self.scopes, self.model.timed or (), strict=True):
                table = np.empty([len(self.grids[group]) for group in scope])
                for place in np.ndindex(*table.shape):
                    for group, index in zip(scope, place, strict=True):
                        dense[group] = self.grids[group][index]
                    table[place] = layer(dense)
                merged[scope] = merged.get(scope, 0.0) + table
            return list(merged.items())
        for scope, term in zip(self.scopes, self.model.terms, strict=True):
            table = np.asarray(float(getattr(term, self.metric)))
            for axis, group in enumerate(scope):
                along = np.asarray(self.grids[group], dtype=float) ** term.groups.count(group)
                table = table * along.reshape([-1 if n == axis else 1 for n in range(len(scope))])
            merged[scope] = merged.get(scope, 0.0) + table
        return list(merged.items())

    def best_at(self, price: float, upper: bool = False) -> tuple[Widths, float]:
        """The widths on the grid that maximise value - price · cost, and that maximum.

        With `upper`, a grid's width stands for all up to the next one: the value is that of the
        most, the cost that of the fewest, so that no widths at all have a larger maximum.
        """
        assert self.grids is not None
        factors: list[tuple[tuple[int, ...], np.ndarray]] = []
        for group, grid in enumerate(self.grids):
            most = [*(width - 1 for width in grid[1:]), grid[-1]] if upper else grid
            factors.append(((group,), self.values[group][most]))
        factors += [(scope, -price * table) for scope, table in self.tables]
        choices = []
        for group in self.order:
            own = [factor for factor in factors if group in factor[0]]
            factors = [factor for factor in factors if group not in factor[0]]
            scope = tuple(sorted(set().union(*(groups for groups, _ in own)) - {group}))
            table = sum(_spread(*factor, (*scope, group)) for factor in own)
            chosen = np.argmax(table, axis=-1)
            factors.append((scope, np.take_along_axis(table, chosen[..., None], -1)[..., 0]))
            choices.append((group, scope, chosen))
        found: dict[int, int] = {}
        for group, scope, chosen in reversed(choices):
            found[group] = int(chosen[tuple(found[other] for other in scope)])
        widths = tuple(self.grids[group][found[group]] for group in range(len(self.grids)))
        return widths, float(sum(table for _, table in factors))

    def climbed(self, price: float, start: Widths) -> Widths:
        """One group after the other at its best width beside the others, until none changes."""
        widths = start
        for _ in range(50):
            before = widths
            for group in range(len(widths)):
                choices = np.array(self.ladder(group))
                worth = self.values[group][choices] - price * self.costs(widths, group, choices)
                widths = (*widths[:group], int(choices[worth.argmax()]), *widths[group + 1 :])
            if widths == before:
                break
        return widths

    def costs(self, widths: Widths, group: int, choices: np.ndarray) -> np.ndarray:
        """The cost at each width that one group may have beside the others; up to a constant."""
        if self.metric == "latency":
            totals = (self.cost((*widths[:group], w, *widths[group + 1 :])) for w in choices)
            return np.fromiter(totals, float, len(choices))
        # at most quadratic in one width: the price of a unit is a line through those of two
        ends = ((*widths[:group], width, *widths[group + 1 :]) for width in (1, 2))
        one, two = (getattr(self.model.marginal(end, group), self.metric) for end in ends)
        return one * choices + (two - one) * choices * (choices - 1) / 2

    # --- the price of a budget --------------------------------------------------------------------

    def within(self, budget: float) -> tuple[Widths, float]:
        """Good widths of at most this cost, with the price that found them."""

        def at(price: float) -> Widths:
            if self.grids is None:
                return self.climbed(price, self.largest)
            return self.best_at(price)[0]

        low, high = 0.0, self.value(self.largest) / self.cost(self.largest)
        while self.cost(at(high)) > budget and high < 1e30:
            low, high = high, high * 4
        found = at(high)
        for _ in range(BISECTIONS):
            price = (low + high) / 2
            widths = at(price)
            if self.cost(widths) > budget:
                low = price
            else:
                high = price
                found = max(found, widths, key=self.value)
            if high - low <= 1e-6 * high:
                break
        if self.cost(found) > budget:
            found = self.smallest
        return self.filled(found, budget), high

    def filled(self, widths: Widths, budget: float) -> Widths:
        """`widths`, and step by step what is worth most for its cost while the budget allows."""
        while True:
            grown = self.stepped(widths, budget)
            if grown is None:
                return widths
            widths = grown

    def stepped(self, widths: Widths, budget: float = math.inf) -> Widths | None:
        """One step of the group whose step is worth most for its cost; None if none fits."""
        total = self.cost(widths)
        best, most = None, -1.0
        for group, width in enumerate(widths):
            if width >= self.largest[group]:
                continue
            more = min(self.largest[group], width - width % self.limits.align + self.limits.align)
            now, then = self.costs(widths, group, np.array([width, more]))
            spent = float(then - now)
            worth = (self.values[group][more] - self.values[group][width]) / max(spent, 1e-12)
            if total + spent <= budget and worth > most:
                best, most = (*widths[:group], more, *widths[group + 1 :]), worth
        return best

    def bound(self, price: float, cost: float) -> float:
        """No widths of at most this cost are worth more (weak duality)."""
        if self.grids is None:
            return math.inf
        return self.best_at(price, upper=True)[1] + price * cost


def _thinned(widths: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, the ends included, evenly."""
    if len(widths) <= count:
        return list(widths)
    return [widths[round(n * (len(widths) - 1) / (count - 1))] for n in range(count)]


def _spread(scope: tuple[int, ...], table: np.ndarray, over: tuple[int, ...]) -> np.ndarray:
    """`table` of the groups `scope`, with one axis for each group of `over`."""
    table = table.transpose([scope.index(group) for group in over if group in scope])
    lengths = iter(table.shape)
    return table.reshape([next(lengths) if group in scope else 1 for group in over])
