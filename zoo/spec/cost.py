"""Parameters, MACs and latency of a network from the widths of its channel groups. No torch.

Parameters and MACs are sums of terms `coef · w_i · w_j` over group widths w. A term comes from the
product of a weight's dimensions; each dimension is a constant plus the positions that groups own in
it. Latency is a sum of measured layers, each interpolated between the widths it was timed at.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from zoo.errors import ZooError, unknown
from zoo.spec.groups import ChannelGroups, InputShape
from zoo.spec.profile import METRICS

__all__ = [
    "Conditions",
    "Cost",
    "CostModel",
    "CostTerm",
    "Extent",
    "LatencyTable",
    "LayerTimes",
    "TimedLayer",
    "cost_model",
    "extents",
]


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates of one forward pass of one image.

    `latency` is in milliseconds per batch, under a table's `Conditions`; None without a table.
    """

    params: int
    macs: int
    latency: float | None = None


@dataclass(frozen=True)
class Conditions:
    """What a latency depends on beside the network: device, software, threads, inputs.

    Attributes:
        runtime, provider: ONNX Runtime with its version, and what it ran on; "" for PyTorch.
        step: widths between two multiples of it take as long as the larger one.
    """

    device: str
    torch: str
    threads: int
    dtype: str
    batch: int
    image_size: int
    inputs: tuple[InputShape, ...] = ()
    runtime: str = ""
    provider: str = ""
    step: int = 1

    @property
    def where(self) -> str:
        """Hardware, threads and software, as text."""
        software = f"{self.runtime} with {self.provider}" if self.runtime else f"torch {self.torch}"
        return f"{self.device}, {self.threads} thread(s), {software}"


@dataclass(frozen=True)
class LayerTimes:
    """Times of the layer with `weight`: `ms[o][i]` milliseconds at `outputs[o]` by `inputs[i]`.

    `outputs` and `inputs` are ascending lengths of the weight's first two dimensions; times never
    fall along them. Lengths between two multiples of `step` take as long as the larger one.
    """

    weight: str
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    step: int = 1

    def __call__(self, outputs: int, inputs: int) -> float:
        """Milliseconds, interpolated bilinearly in the grid; outside of it, those of its edge."""
        row, across = _place(self.outputs, -(-outputs // self.step) * self.step)
        column, along = _place(self.inputs, -(-inputs // self.step) * self.step)
        low, high = (
            times[column] + along * (times[column + 1] - times[column]) if along else times[column]
            for times in (self.ms[row], self.ms[row + 1 if across else row])
        )
        return low + across * (high - low)


@dataclass(frozen=True)
class LatencyTable:
    """The measured layers of one network, and `rest`: milliseconds that no width changes."""

    conditions: Conditions
    layers: tuple[LayerTimes, ...]
    rest: float


@dataclass(frozen=True)
class CostTerm:
    """A term: `params` and `macs`, each times the product of the widths of `groups` (indices)."""

    groups: tuple[int, ...]
    params: int
    macs: int


@dataclass(frozen=True)
class Extent:
    """The length of one dimension: `fixed` positions, and some for each unit of certain groups.

    `per` holds pairs (group index, positions per unit).
    """

    fixed: int
    per: tuple[tuple[int, int], ...] = ()

    def __call__(self, widths: Sequence[int]) -> int:
        return self.fixed + sum(per * widths[group] for group, per in self.per)


@dataclass(frozen=True)
class TimedLayer:
    """A measured layer with the extents of its weight's output and input dimensions."""

    outputs: Extent
    inputs: Extent
    times: LayerTimes

    @property
    def groups(self) -> set[int]:
        return {group for group, _ in (*self.outputs.per, *self.inputs.per)}

    def __call__(self, widths: Sequence[int]) -> float:
        return self.times(self.outputs(widths), self.inputs(widths))


@dataclass(frozen=True)
class CostModel:
    """Costs as functions of the widths of the groups; `sizes` are the dense widths.

    `timed` and `rest` give the latency; `timed` is None where it was not measured.
    """

    sizes: tuple[int, ...]
    terms: tuple[CostTerm, ...]
    timed: tuple[TimedLayer, ...] | None = None
    rest: float = 0.0

    def __call__(self, widths: Sequence[int]) -> Cost:
        """The cost of a network with these widths; parameters and MACs are exact."""
        params = macs = 0
        for term in self.terms:
            product = 1
            for group in term.groups:
                product *= widths[group]
            params += term.params * product
            macs += term.macs * product
        latency = None if self.timed is None else self.total(widths, "latency")
        return Cost(params, macs, latency)

    @cached_property
    def dense(self) -> Cost:
        """The cost of the unpruned network."""
        return self(self.sizes)

    def total(self, widths: Sequence[int], metric: str) -> float:
        """The cost at `widths` in one metric.

        Raises:
            ZooError: for an unknown metric, or `latency` where no layer was measured.
        """
        if metric == "latency" and self.timed is not None:
            return self.rest + sum(layer(widths) for layer in self.timed)
        if metric not in self._coefficients:
            if metric not in METRICS:
                raise unknown("metric", metric, METRICS)
            raise ZooError(f"The {metric} of this network was not measured; use params or macs.")
        total = 0
        for groups, coefficient in self._coefficients[metric]:
            for group in groups:
                coefficient *= widths[group]
            total += coefficient
        return total

    def factor(self, widths: Sequence[int], metric: str) -> float:
        """Compression factor: dense cost / cost at `widths`, of one of `METRICS`."""
        pruned = self.total(widths, metric)
        return float(getattr(self.dense, metric)) / pruned

    def marginal(self, widths: Sequence[int], group: int, units: int = 1) -> Cost:
        """What removing a unit of `group`, or several, saves at `widths`."""
        fewer = list(widths)
        fewer[group] -= units
        params = macs = 0
        for term in self._terms_of[group]:
            before = after = 1
            for index in term.groups:
                before *= widths[index]
                after *= fewer[index]
            params += term.params * (before - after)
            macs += term.macs * (before - after)
        if self.timed is None:
            return Cost(params, macs)
        return Cost(params, macs, sum(t(widths) - t(fewer) for t in self._timed_of[group]))

    @cached_property
    def neighbours(self) -> list[set[int]]:
        """Per group, the groups whose marginal cost depends on its width, itself included."""
        near: list[set[int]] = []
        for group in range(len(self.sizes)):
            exact = (set(term.groups) for term in self._terms_of[group])
            near.append({group}.union(*exact, *(t.groups for t in self._timed_of[group])))
        return near

    @cached_property
    def _coefficients(self) -> dict[str, list[tuple[tuple[int, ...], int]]]:
        return {
            "params": [(t.groups, t.params) for t in self.terms if t.params],
            "macs": [(t.groups, t.macs) for t in self.terms if t.macs],
        }

    @cached_property
    def _terms_of(self) -> list[list[CostTerm]]:
        return [[t for t in self.terms if group in t.groups] for group in range(len(self.sizes))]

    @cached_property
    def _timed_of(self) -> list[list[TimedLayer]]:
        timed: list[list[TimedLayer]] = [[] for _ in self.sizes]
        for layer in self.timed or ():
            for group in layer.groups:
                timed[group].append(layer)
        return timed


def cost_model(groups: ChannelGroups, latency: LatencyTable | None = None) -> CostModel:
    """The cost model of a network with these groups; a table of its layers adds latency."""
    terms: dict[tuple[int, ...], list[int]] = defaultdict(lambda: [0, 0])
    if groups.fixed_macs:
        terms[()][1] = groups.fixed_macs
    lengths = extents(groups)
    for name in groups.shapes:
        is_parameter = name not in groups.buffers
        if not is_parameter and name not in groups.positions:
            continue
        products: dict[tuple[int, ...], int] = {(): 1}
        for extent in lengths[name]:
            factors: dict[tuple[int, ...], int] = {(index,): per for index, per in extent.per}
            if extent.fixed:
                factors[()] = extent.fixed
            products = _multiply(products, factors)
        for key, coefficient in products.items():
            terms[key][0] += coefficient * is_parameter
            terms[key][1] += coefficient * groups.positions.get(name, 0)
    exact = tuple(CostTerm(key, p, m) for key, (p, m) in terms.items())
    if latency is None:
        return CostModel(groups.sizes, exact)
    timed = tuple(
        TimedLayer(lengths[layer.weight][0], lengths[layer.weight][1], layer)
        for layer in latency.layers
    )
    return CostModel(groups.sizes, exact, timed, latency.rest)


def extents(groups: ChannelGroups) -> dict[str, tuple[Extent, ...]]:
    """Tensor name -> the extent of each of its dimensions."""
    owners: dict[tuple[str, int], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for index, group in enumerate(groups.groups):
        for slot in group.slots:
            owners[slot.tensor, slot.dim][index] += slot.block
    lengths = {}
    for name, shape in groups.shapes.items():
        dims = []
        for dim, length in enumerate(shape):
            owned = owners.get((name, dim), {})
            fixed = length - sum(per * groups.sizes[index] for index, per in owned.items())
            dims.append(Extent(fixed, tuple(owned.items())))
        lengths[name] = tuple(dims)
    return lengths


def _multiply(
    left: dict[tuple[int, ...], int], right: dict[tuple[int, ...], int]
) -> dict[tuple[int, ...], int]:
    product: dict[tuple[int, ...], int] = defaultdict(int)
    for a, x in left.items():
        for b, y in right.items():
            product[tuple(sorted(a + b))] += x * y
    return dict(product)


def _place(grid: Sequence[int], at: int) -> tuple[int, float]:
    """Index of the grid point at or below `at`, and the share of the way to the next, in [0, 1)."""
    below = bisect_right(grid, at) - 1
    if below < 0:
        return 0, 0.0
    if below + 1 == len(grid):
        return below, 0.0
    return below, (at - grid[below]) / (grid[below + 1] - grid[below])
