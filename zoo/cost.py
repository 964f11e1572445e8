"""Parameters and MACs of a network from the widths of its channel groups. No torch.

Every cost is a sum of terms `coef · w_i · w_j` over group widths w: the product of a weight's
dimensions, each a constant plus the positions that groups own in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from zoo.errors import unknown
from zoo.groups import ChannelGroups
from zoo.profile import METRICS

__all__ = ["Cost", "CostModel", "CostTerm", "cost_model"]


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates of one forward pass of one image."""

    params: int
    macs: int


@dataclass(frozen=True)
class CostTerm:
    """`params` and `macs` times the product of the widths of `groups`, by index."""

    groups: tuple[int, ...]
    params: int
    macs: int


@dataclass(frozen=True)
class CostModel:
    """Costs as functions of the widths of the groups; `sizes` are the dense widths."""

    sizes: tuple[int, ...]
    terms: tuple[CostTerm, ...]

    def __call__(self, widths: Sequence[int]) -> Cost:
        """The cost of a network with these widths, exactly."""
        params = macs = 0
        for term in self.terms:
            product = 1
            for group in term.groups:
                product *= widths[group]
            params += term.params * product
            macs += term.macs * product
        return Cost(params, macs)

    @cached_property
    def dense(self) -> Cost:
        """The cost of the unpruned network."""
        return self(self.sizes)

    def factor(self, widths: Sequence[int], metric: str) -> float:
        """Compression factor: dense cost / cost at `widths`, of `params` or `macs`."""
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        return getattr(self.dense, metric) / getattr(self(widths), metric)

    def marginal(self, widths: Sequence[int], group: int) -> Cost:
        """What removing one unit of `group` saves at `widths`."""
        fewer = list(widths)
        fewer[group] -= 1
        params = macs = 0
        for term in self._terms_of[group]:
            before = after = 1
            for index in term.groups:
                before *= widths[index]
                after *= fewer[index]
            params += term.params * (before - after)
            macs += term.macs * (before - after)
        return Cost(params, macs)

    @cached_property
    def _terms_of(self) -> list[list[CostTerm]]:
        return [[t for t in self.terms if group in t.groups] for group in range(len(self.sizes))]


def cost_model(groups: ChannelGroups) -> CostModel:
    """The cost terms of a network with these channel groups."""
    owners: dict[tuple[str, int], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for index, group in enumerate(groups.groups):
        for slot in group.slots:
            owners[slot.tensor, slot.dim][index] += slot.block
    sizes = groups.sizes
    terms: dict[tuple[int, ...], list[int]] = defaultdict(lambda: [0, 0])
    for name, shape in groups.shapes.items():
        if name in groups.buffers:
            continue
        products: dict[tuple[int, ...], int] = {(): 1}
        for dim, length in enumerate(shape):
            owned = owners.get((name, dim), {})
            fixed = length - sum(per * sizes[index] for index, per in owned.items())
            factors: dict[tuple[int, ...], int] = {(index,): per for index, per in owned.items()}
            if fixed:
                factors[()] = fixed
            products = _multiply(products, factors)
        for key, coefficient in products.items():
            terms[key][0] += coefficient
            terms[key][1] += coefficient * groups.positions.get(name, 0)
    return CostModel(sizes, tuple(CostTerm(key, p, m) for key, (p, m) in terms.items()))


def _multiply(
    left: dict[tuple[int, ...], int], right: dict[tuple[int, ...], int]
) -> dict[tuple[int, ...], int]:
    product: dict[tuple[int, ...], int] = defaultdict(int)
    for a, x in left.items():
        for b, y in right.items():
            product[tuple(sorted(a + b))] += x * y
    return dict(product)
