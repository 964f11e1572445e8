"""Policies: how much to keep of every channel group, without a search."""

from __future__ import annotations

import random
from collections.abc import Callable

from zoo.errors import FactorError, unknown
from zoo.planning.solver import (
    FLOOR,
    FREE,
    Limits,
    Solution,
    meet,
    round_widths,
    scale_curve,
    solve,
)
from zoo.spec.cost import CostModel

__all__ = ["POLICIES", "policy_solution"]

_TINY = 1e-3
"""The smallest keep ratio, never zero; every group keeps at least one channel anyway."""


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


def residual_dense(
    model: CostModel, cf: float, metric: str, seed: int, limits: Limits = FREE
) -> Solution:
    """Residual streams stay whole; all other groups have the same keep ratio.

    As in most published profiles of ResNet-50 (`registry/published/`). A stream is a group that
    meets more than two others in a layer. Without any, it is `equal`.
    """
    del seed
    streams = [len(near) > 3 for near in model.neighbours]  # the group itself is one of them
    return solve(
        model, lambda t: [1.0 if whole else max(_TINY, t) for whole in streams], cf, metric, limits
    )


def random_policy(
    model: CostModel, cf: float, metric: str, seed: int, limits: Limits = FREE
) -> Solution:
    """β uniform in [0.3, 0.9] per group (paper, section 3), scaled to the factor."""
    draw = random.Random(f"random policy:{seed}")
    actions = [draw.uniform(0.3, 0.9) for _ in model.sizes]
    return solve(model, scale_curve(actions), cf, metric, limits)


def greedy(model: CostModel, cf: float, metric: str, seed: int, limits: Limits = FREE) -> Solution:
    """Removes units where the metric falls most per loss of the other metric.

    The other metric of `params` is `macs`; that of `macs` and of `latency` is `params`. Groups
    within a tenth of the fastest count as equal, as the layers of one resolution nearly are; of
    those the least pruned is cut next, so that they shrink evenly. No group goes below a keep ratio
    of 0.1, rounded. The result is the visited widths nearest to the factor or, if these are not
    near enough, widths close to them.
    """
    del seed
    other = "macs" if metric == "params" else "params"
    whole = [1.0] * len(model.sizes)
    floor = round_widths(model.sizes, [FLOOR] * len(whole), limits)
    largest = above = below = round_widths(model.sizes, whole, limits)

    def smaller(group: int, most: int) -> int:
        return max(floor[group], most - most % limits.align)

    def gain(group: int) -> float:
        width = below[group]
        saved = model.marginal(below, group, width - smaller(group, width - 1))
        return getattr(saved, metric) / max(1, getattr(saved, other))

    gains = {g: gain(g) for g, width in enumerate(below) if width > floor[g]}
    while gains and model.factor(below, metric) < cf:
        fastest = max(gains.values())
        fast = [group for group, value in gains.items() if value >= 0.9 * fastest]
        chosen = max(fast, key=lambda group: (below[group] / model.sizes[group], -group))
        width = smaller(chosen, below[chosen] - max(1, model.sizes[chosen] // 128))
        above, below = below, (*below[:chosen], width, *below[chosen + 1 :])
        for group in model.neighbours[chosen] & gains.keys():
            gains[group] = gain(group)
        if width == floor[chosen]:
            del gains[chosen]
    best = meet(model, cf, metric, limits, (floor, below, above, largest))
    ratios = tuple(width / size for width, size in zip(best, model.sizes, strict=True))
    return Solution(best, ratios, cf, model.factor(best, metric))


POLICIES: dict[str, Callable[[CostModel, float, str, int, Limits], Solution]] = {
    "equal": equal,
    "increasing": increasing,
    "decreasing": decreasing,
    "residual-dense": residual_dense,
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
