"""Widths that meet a compression factor. Neither torch nor modules: costs and curves only.

A *curve* maps t in [0, 1] to one keep ratio per group, none of which falls when t rises. The
widths that are considered along it do not depend on the factor, and the nearest is taken, so that a
larger factor never gives a larger network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from zoo.cost import CostModel
from zoo.errors import FactorError

__all__ = ["FLOOR", "FREE", "Limits", "Solution", "round_widths", "scale_curve", "solve"]

FLOOR = 0.1
"""Smallest keep ratio of a search's action (paper, section 8.2)."""

Curve = Callable[[float], Sequence[float]]


@dataclass(frozen=True)
class Limits:
    """What widths may be.

    Attributes:
        align: widths are multiples of it, or whole; never zero.
        pinned: group index -> the one width it may have.
    """

    align: int = 1
    pinned: Mapping[int, int] = field(default_factory=dict)


FREE = Limits()


@dataclass(frozen=True)
class Solution:
    """Widths per group, the ratios they were rounded from, and the factor asked for and met."""

    widths: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    asked: float
    got: float


def round_widths(
    sizes: Sequence[int], keep_ratios: Sequence[float], limits: Limits = FREE
) -> tuple[int, ...]:
    """β · size to the nearest allowed width, half up, at least one (or `align`) and at most all."""
    widths = []
    for group, (size, ratio) in enumerate(zip(sizes, keep_ratios, strict=True)):
        steps = max(1, math.floor(ratio * size / limits.align + 0.5))
        widths.append(limits.pinned.get(group, min(size, steps * limits.align)))
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
    """The widths along `curve` whose factor of `metric` is nearest to `cf`.

    Args:
        model: the costs as functions of widths.
        curve: t in [0, 1] -> keep ratios, monotone.
        cf: the asked compression factor, at least 1.
        metric: `params` or `macs`.
        limits: what widths may be.

    Raises:
        FactorError: if `cf` lies outside what the curve reaches, naming that range.
    """
    sizes = model.sizes

    def widths_at(t: float) -> tuple[int, ...]:
        return round_widths(sizes, curve(t), limits)

    smallest, largest = widths_at(0.0), widths_at(1.0)
    low_cf, high_cf = model.factor(largest, metric), model.factor(smallest, metric)
    if not low_cf * 0.98 <= cf <= high_cf * 1.02:
        raise FactorError(
            f"A {metric} factor of {cf:g} cannot be reached here: this policy reaches "
            f"{low_cf:.3g} to {high_cf:.3g}."
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if model.factor(widths_at(middle), metric) > cf:
            low = middle
        else:
            high = middle
    below, above = widths_at(low), widths_at(high)
    best = min(_between(below, above), key=lambda widths: _distance(model, widths, cf, metric))
    got = model.factor(best, metric)
    # β is stated so that rounding it gives exactly these widths again.
    ratios = zip(curve(high), best, sizes, strict=True)
    stated = tuple(
        r if round_widths([size], [r])[0] == width else width / size for r, width, size in ratios
    )
    return Solution(best, stated, cf, got)


def _between(below: tuple[int, ...], above: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Widths from `below` to `above`: a set that does not depend on the asked factor.

    Several groups can round up at the same t. Of few, every subset is tried; of many, those that
    grow in order, with at most one other ahead of its turn.
    """
    tied = [group for group, width in enumerate(below) if above[group] != width]
    subsets: Iterable[Sequence[int]]
    if len(tied) <= 8:
        subsets = itertools.chain.from_iterable(
            itertools.combinations(tied, count) for count in range(len(tied) + 1)
        )
    else:
        subsets = itertools.chain.from_iterable(
            [[*tied[:count], ahead] for ahead in tied[count:]] for count in range(len(tied))
        )
        subsets = itertools.chain([()], subsets)
    for subset in subsets:
        yield tuple(above[g] if g in subset else width for g, width in enumerate(below))


def _distance(model: CostModel, widths: Sequence[int], cf: float, metric: str) -> float:
    return abs(math.log(model.factor(widths, metric) / cf))
