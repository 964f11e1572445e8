"""Widths that meet a compression factor, from costs and curves alone: no torch, no modules.

A *curve* maps t in [0, 1] to one keep ratio per group, none of which falls when t rises. If no
widths on it are near enough to the factor, the step of the curve across the factor is an interval
of cost, which is divided again and again by widths close to its ends. Neither the widths on the
curve nor those that divide an interval depend on the factor, and the nearest are taken. So a larger
factor never gives a network of larger cost.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from zoo.errors import FactorError
from zoo.spec.cost import CostModel

__all__ = [
    "FLOOR",
    "FREE",
    "Limits",
    "Solution",
    "allowed_widths",
    "meet",
    "round_widths",
    "scale_curve",
    "solve",
]

FLOOR = 0.1
"""Smallest keep ratio of a search's action (paper, section 8.2)."""

TOLERANCE = 0.01
"""Relative error up to which a factor is met."""

_CANDIDATES = 16
"""Number of widths that may divide one interval: of thousands, the nearest to its middle."""

_FEW = 4096
"""Maximum number of widths that are tried exhaustively where the nearby ones give nothing."""

Curve = Callable[[float], Sequence[float]]
Widths = tuple[int, ...]
Cost = Callable[[Sequence[int]], float]
Point = tuple[float, Widths]
"""(cost, widths)."""


@dataclass(frozen=True)
class Limits:
    """Limits on the widths.

    Attributes:
        align: widths are multiples of it, or the whole group; never zero.
        pinned: group index -> its fixed width.
        floor: the least keep ratio of a group that is not pinned.
    """

    align: int = 1
    pinned: Mapping[int, int] = field(default_factory=dict)
    floor: float = 0.0


FREE = Limits()


@dataclass(frozen=True)
class Solution:
    """Widths per group, the ratios they were rounded from, and the factor asked for and met."""

    widths: Widths
    keep_ratios: tuple[float, ...]
    asked: float
    got: float


def round_widths(
    sizes: Sequence[int], keep_ratios: Sequence[float], limits: Limits = FREE
) -> Widths:
    """β · size rounded to the nearest allowed width, half up; never below the floor, never zero."""
    align, widths = limits.align, []
    for group, (size, ratio) in enumerate(zip(sizes, keep_ratios, strict=True)):
        least = max(1, math.ceil(limits.floor * size / align - 1e-9)) * align
        below = math.floor(ratio * size / align) * align
        above = min(size, below + align)
        nearest = above if 2 * ratio * size >= below + above else below
        widths.append(limits.pinned.get(group, min(size, max(least, nearest))))
    return tuple(widths)


def scale_curve(actions: Sequence[float], floor: float = FLOOR) -> Curve:
    """t -> clip(λ · a, floor, 1), with λ from 0 to where every ratio is 1 (`scale` projection)."""
    largest = 1 / min(max(action, 1e-6) for action in actions)
    return lambda t: [min(1.0, max(floor, t * largest * action)) for action in actions]


def solve(
    model: CostModel,
    curve: Curve,
    cf: float,
    metric: str = "params",
    limits: Limits = FREE,
) -> Solution:
    """Widths on `curve`, or close to it, whose factor of `metric` is `cf` within `TOLERANCE`.

    If none so near are found, the nearest that are. No group leaves the range that the curve gives
    it.

    Args:
        model: the costs as functions of widths.
        curve: t in [0, 1] -> keep ratios, monotone.
        cf: the asked compression factor, at least 1.
        metric: `params`, `macs`, or `latency` where the model has one.
        limits: on the widths.

    Raises:
        FactorError: if the curve does not reach `cf`; the message gives the range that it reaches.
    """
    sizes = model.sizes

    def widths_at(t: float) -> Widths:
        return round_widths(sizes, curve(t), limits)

    smallest, largest = widths_at(0.0), widths_at(1.0)
    low, high, below, above = 0.0, 1.0, smallest, largest
    for _ in range(60):
        middle = (low + high) / 2
        widths = widths_at(middle)
        if model.factor(widths, metric) > cf:
            low, below = middle, widths
        else:
            high, above = middle, widths
        if _is_one_step(below, above, limits.align):
            break
    best = meet(model, cf, metric, limits, (smallest, below, above, largest))
    # Rounding the stated β gives exactly these widths again.
    ratios = zip(curve(high), best, sizes, strict=True)
    stated = tuple(
        r if round_widths([size], [r])[0] == width else width / size for r, width, size in ratios
    )
    return Solution(best, stated, cf, model.factor(best, metric))


def meet(
    model: CostModel, cf: float, metric: str, limits: Limits, path: tuple[Widths, ...]
) -> Widths:
    """Widths at, or between, two neighbours on a path, whose factor is `cf` within `TOLERANCE`.

    Args:
        model, cf, metric, limits: as in `solve`.
        path: its smallest widths, the two neighbours around `cf`, and its largest widths; no group
            shrinks from one to the next.

    Raises:
        FactorError: if the path does not reach `cf`; the message gives the range that it reaches.
    """
    smallest, below, above, largest = path
    first, last = model.factor(largest, metric), model.factor(smallest, metric)
    if not first * (1 - TOLERANCE) <= cf <= last * (1 + TOLERANCE):
        raise FactorError(
            f"A {metric} factor of {cf:g} cannot be reached here: this policy reaches "
            f"{first:.4g} to {last:.4g}."
        )
    ladders = [
        allowed_widths(*bounds, limits.align) for bounds in zip(smallest, largest, strict=True)
    ]
    target = model.total(model.sizes, metric) / cf

    def cost(widths: Sequence[int]) -> float:
        return model.total(widths, metric)

    def off(point: Point) -> float:
        return abs(target / point[0] - 1)

    low, high = (cost(below), below), (cost(above), above)
    inside = [(cost(widths), widths) for widths in _between(below, above)]
    while True:
        between = {total: widths for total, widths in inside[::-1] if low[0] < total < high[0]}
        points = [low, *sorted(between.items()), high]
        at = min(max(1, bisect_left(points, (target, ()))), len(points) - 1)
        low, high = points[at - 1], points[at]
        nearest = min(low, high, key=off)
        if off(nearest) <= TOLERANCE or low[0] >= high[0]:
            return nearest[1]
        inside = _nearby(cost, ladders, low, high)
        if not inside:
            inside = [
                (total, widths)
                for widths in itertools.product(*_around(ladders, low[1]))
                if low[0] < (total := cost(widths)) < high[0]
            ]
        if not inside:
            return nearest[1]


def allowed_widths(least: int, most: int, align: int) -> list[int]:
    """The widths from `least` to `most` that a group may have."""
    return sorted({least, most, *range(math.ceil(least / align) * align, most, align)})


def _around(ladders: Sequence[Sequence[int]], widths: Widths) -> list[Sequence[int]]:
    """The part of every ladder near `widths`: at most `_FEW` combinations in all."""
    radius = max(map(len, ladders))
    while radius:
        near = []
        for ladder, width in zip(ladders, widths, strict=True):
            at = bisect_left(ladder, width)
            near.append(ladder[max(0, at - radius) : at + radius + 1])
        if math.prod(map(len, near)) <= _FEW:
            return near
        radius //= 2
    return [[width] for width in widths]


def _is_one_step(below: Widths, above: Widths, align: int) -> bool:
    """Whether no widths lie between: at most one group differs, by one step."""
    steps = [big - small for small, big in zip(below, above, strict=True) if big != small]
    return len(steps) <= 1 and sum(steps) <= align


def _between(below: Widths, above: Widths) -> Iterator[Widths]:
    """Widths from `below` to `above` where several groups round up at the same t.

    Of up to 8 such groups, every subset grows. Of more, they grow in order, with at most one other
    ahead of its turn.
    """
    tied = [group for group, width in enumerate(below) if above[group] != width]
    subsets: Iterable[Sequence[int]] = (
        [*tied[:count], ahead] for count in range(len(tied)) for ahead in tied[count:]
    )
    if len(tied) <= 8:
        counts = range(1, len(tied))
        subsets = itertools.chain.from_iterable(itertools.combinations(tied, n) for n in counts)
    for subset in subsets:
        yield tuple(above[g] if g in subset else width for g, width in enumerate(below))


def _nearby(cost: Cost, ladders: Sequence[Sequence[int]], low: Point, high: Point) -> list[Point]:
    """Points with a cost between both ends, one step of one or two groups away from either end.

    Of the many, those whose cost, estimated as the sum of both steps' changes, is nearest to the
    interval's middle.
    """
    middle = (low[0] + high[0]) / 2
    found: list[Point] = []
    for total, widths in (low, high):
        steps = [(0.0, -1, 0)]
        for group, ladder in enumerate(ladders):
            at = bisect_left(ladder, widths[group])
            for width in (*ladder[max(0, at - 1) : at], *ladder[at + 1 : at + 2]):
                changed = (*widths[:group], width, *widths[group + 1 :])
                steps.append((cost(changed) - total, group, width))
        steps.sort()
        for change, group, width in steps:
            at = bisect_left(steps, (middle - total - change,))
            for other_change, other, other_width in steps[max(0, at - 2) : at + 2]:
                if other < group:
                    pair = list(widths)
                    pair[group] = width
                    if other >= 0:
                        pair[other] = other_width
                    found.append((abs(total + change + other_change - middle), tuple(pair)))
    nearest = [widths for _, widths in heapq.nsmallest(_CANDIDATES, set(found))]
    points = [(cost(widths), widths) for widths in nearest]
    return [point for point in points if low[0] < point[0] < high[0]]
