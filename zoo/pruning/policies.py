"""Policies: how much to keep of every channel group, without a search."""

from __future__ import annotations

import random
from collections.abc import Callable

from zoo.cost import CostModel
from zoo.errors import FactorError, unknown
from zoo.solver import FLOOR, FREE, Limits, Solution, round_widths, scale_curve, solve

__all__ = ["POLICIES", "policy_solution"]

_TINY = 1e-3
"""Keep ratios are never zero; every group keeps at least one channel anyway."""


def equal(model: CostModel, cf: float, metric: str, seed: int, limits: Limits = FREE) -> Solution:
    """The same keep ratio for every group (paper, section 3)."""
    del seed
    return solve(model, lambda t: [max(_TINY, t)] * len(model.sizes), cf, metric, limits)


def increasing(
    model: CostModel, cf: float, metric: str, seed: int, limits: Limits = FREE
) -> Solution:
    """Pruning grows with depth: β falls linearly from 1 in the first group to b in the last."""
    del seed
    return solve(model, lambda t: _line(len(model.sizes), t), cf, metric, limits)


def decreasing(
    model: CostModel, cf: float, metric: str, seed: int, limits: Limits = FREE
) -> Solution:
    """The mirror of `increasing`: β rises linearly from b in the first group to 1 in the last."""
    del seed
    return solve(model, lambda t: _line(len(model.sizes), t)[::-1], cf, metric, limits)


def _line(count: int, last: float) -> list[float]:
    """`count` keep ratios on a line from 1 to `last`."""
    return [max(_TINY, 1 - (1 - last) * n / max(1, count - 1)) for n in range(count)]


def random_policy(
    model: CostModel, cf: float, metric: str, seed: int, limits: Limits = FREE
) -> Solution:
    """β uniform in [0.3, 0.9] per group (paper, section 3), scaled to the factor."""
    draw = random.Random(f"random policy:{seed}")
    actions = [draw.uniform(0.3, 0.9) for _ in model.sizes]
    return solve(model, scale_curve(actions), cf, metric, limits)


def greedy(model: CostModel, cf: float, metric: str, seed: int, limits: Limits = FREE) -> Solution:
    """Removes units where the metric falls fastest per unit of the other metric lost.

    Groups within a tenth of the fastest count as equal, as the layers of one resolution nearly are;
    of those the one that is least pruned goes on, so that they shrink evenly. No group goes below a
    keep ratio of 0.1. Of the widths on the way, those nearest to the factor are taken.
    """
    del seed
    other = "macs" if metric == "params" else "params"
    floor = round_widths(model.sizes, [FLOOR] * len(model.sizes), limits)
    widths = list(round_widths(model.sizes, [1.0] * len(model.sizes), limits))
    best = tuple(widths)
    if model.factor(best, metric) > cf * 1.02:
        raise FactorError(
            f"A {metric} factor of {cf:g} cannot be reached here: the pinned groups alone give "
            f"{model.factor(best, metric):.3g}."
        )
    while model.factor(widths, metric) < cf:
        gains = {}
        for group, width in enumerate(widths):
            if width > floor[group]:
                saved = model.marginal(widths, group)
                gains[group] = getattr(saved, metric) / max(1, getattr(saved, other))
        if not gains:
            raise FactorError(
                f"A {metric} factor of {cf:g} cannot be reached here: greedy reaches at most "
                f"{model.factor(widths, metric):.3g}."
            )
        fast = [group for group, gain in gains.items() if gain >= 0.9 * max(gains.values())]
        chosen = max(fast, key=lambda group: (widths[group] / model.sizes[group], -group))
        fewer = widths[chosen] - max(1, model.sizes[chosen] // 128)
        widths[chosen] = max(floor[chosen], fewer - fewer % limits.align)
        if abs(model.factor(widths, metric) - cf) < abs(model.factor(best, metric) - cf):
            best = tuple(widths)
    ratios = tuple(width / size for width, size in zip(best, model.sizes, strict=True))
    return Solution(best, ratios, cf, model.factor(best, metric))


POLICIES: dict[str, Callable[[CostModel, float, str, int, Limits], Solution]] = {
    "equal": equal,
    "increasing": increasing,
    "decreasing": decreasing,
    "random": random_policy,
    "greedy": greedy,
}


def policy_solution(
    name: str,
    model: CostModel,
    cf: float,
    metric: str = "params",
    seed: int = 0,
    limits: Limits = FREE,
) -> Solution:
    """The widths within `limits` that policy `name` gives at factor `cf` of `metric`.

    Raises:
        ZooError: for an unknown policy or metric.
        FactorError: when the policy cannot reach the factor.
    """
    if name not in POLICIES:
        raise unknown("policy", name, POLICIES)
    if not cf >= 1:
        raise FactorError(f"A compression factor is at least 1, got {cf:g}.")
    return POLICIES[name](model, cf, metric, seed, limits)
