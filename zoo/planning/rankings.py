"""Rankings: policies that decide widths by the scores of the network's own channels.

A criterion scores the channels of all groups. They are ranked together, and the lowest are cut
until the factor is met; or those are kept that are worth most together within the budget.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zoo.criteria.weight_scores import Scores
from zoo.errors import GraphError
from zoo.planning.knapsack import knapsack_solution
from zoo.planning.solver import FREE, Curve, Limits, Solution, solve
from zoo.spec.cost import CostModel

__all__ = ["BEST_RANKING", "RANKINGS", "Ranking", "ranking_solution"]

Normalise = Callable[[Sequence[float]], list[float]]


def by_mean(scores: Sequence[float]) -> list[float]:
    """s / mean(s), so that every group has the same mean (Fang et al., 2023, "DepGraph")."""
    total = math.fsum(scores)
    return [score * len(scores) / total if total else 0.0 for score in scores]


def by_those_above(scores: Sequence[float]) -> list[float]:
    """s² / Σ s² of the channels that score as high or higher (Lee et al., 2021, "LAMP").

    The best channel of every group scores 1, so that no group is cut away.
    """
    found = [0.0] * len(scores)
    above = 0.0
    for index in sorted(range(len(scores)), key=lambda n: -scores[n]):
        above += scores[index] ** 2
        found[index] = scores[index] ** 2 / above if above else 0.0
    return found


@dataclass(frozen=True)
class Ranking:
    """How the channels of all groups are made comparable.

    Attributes:
        criterion: name of the criterion that scores them.
        normalise: the scores of one group -> the scores to rank.
        per_cost: divide by the cost of one channel in the asked metric, at dense widths.
        knapsack: keep the largest sum of scores within the budget, instead of cutting the lowest.
    """

    criterion: str
    normalise: Normalise = list
    per_cost: bool = False
    knapsack: bool = False


RANKINGS: dict[str, Ranking] = {
    "global": Ranking("taylor"),
    "global-per-cost": Ranking("taylor", per_cost=True),
    "global-fisher": Ranking("fisher"),
    "global-fisher-per-cost": Ranking("fisher", per_cost=True),
    "global-l2": Ranking("l2", by_mean),
    "global-bn": Ranking("bn_scale"),
    "global-lamp": Ranking("l2", by_those_above),
    "knapsack": Ranking("taylor", knapsack=True),
}
"""Name -> ranking: Molchanov et al. (2017) without and with their cost term, Theis et al. (2018)
likewise, DepGraph, network slimming (Liu et al., 2017), LAMP; knapsack pruning (Aflalo et al.,
2020)."""


BEST_RANKING = {"params": "global-fisher-per-cost", "macs": "global", "latency": "global"}
"""Metric -> the ranking that the evidence puts first (docs/evidence.md)."""


def ranking_solution(
    ranking: Ranking,
    scores: Scores,
    model: CostModel,
    cf: float,
    metric: str = "params",
    limits: Limits = FREE,
) -> Solution:
    """The widths within `limits` that a ranking gives at factor `cf` of `metric`.

    Args:
        ranking: how scores of different groups compare.
        scores: of the ranking's criterion: one list per group, one number per channel.
        model: the costs as functions of widths.
        cf, metric, limits: as in `solve`.

    Raises:
        FactorError: when the ranking cannot reach the factor.
        GraphError: when the channels of every group score the same.
    """
    alike = not any(map(any, scores)) or not ranking.per_cost
    if alike and all(min(own) == max(own) for own in scores):
        raise GraphError(
            f"The channels of every group score the same by {ranking.criterion!r}, so they cannot "
            f"be ranked: the network is untrained, or no gradient reaches its weights."
        )
    if ranking.knapsack:
        return knapsack_solution(scores, model, cf, metric, limits).solution
    ranked = []
    for group, own in enumerate(scores):
        price = 1.0
        if ranking.per_cost:
            units = min(limits.align, model.sizes[group])
            saved = getattr(model.marginal(model.sizes, group, units), metric)
            price = max(saved / units, 1e-12)
        ranked.append([score / price for score in ranking.normalise(own)])
    return solve(model, _rank_curve(ranked), cf, metric, limits)


def _rank_curve(scores: Scores) -> Curve:
    """t -> keep ratios when the best share t of all channels is kept, at least one per group.

    Equal scores are cut in the order of the groups.
    """
    order = sorted(
        ((score, group) for group, own in enumerate(scores) for score in own), reverse=True
    )
    places: list[list[int]] = [[] for _ in scores]
    for place, (_, group) in enumerate(order, 1):
        places[group].append(place)

    def curve(t: float) -> list[float]:
        kept = t * len(order)
        return [max(1, bisect_right(own, kept)) / len(own) for own in places]

    return curve
