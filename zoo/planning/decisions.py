"""The decision process of the learned policy: one correction for every channel group, in order.

Corrections start from a known policy: `equal`, or with scores of the channels a ranking. A group's
correction a in [-1, 1] multiplies its keep ratio, or the scores of its channels, by exp(a). Zero
corrections reproduce the known policy exactly. The one solver then meets the factor.

What is observed holds nothing of the network's name, and no layer's name or number: only what every
layer of every network has (`FEATURES`). So one policy can decide for any network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.criteria.weight_scores import Scores
from zoo.planning.policies import equal
from zoo.planning.rankings import BEST_RANKING, RANKINGS, Ranking, ranking_solution
from zoo.planning.solver import FREE, Limits, Solution, round_widths, scale_curve, solve
from zoo.spec.cost import CostModel
from zoo.spec.groups import ChannelGroups

__all__ = ["FEATURES", "Decisions"]

FEATURES = (
    "size", "relative size", "depth", "MACs", "parameters", "resolution", "kernel", "shrinks",
    "depthwise", "read by a classifier", "residual stream", "writers", "readers",
    "MACs so far", "parameters so far", "known keep ratio", "left to save", "last correction",
    "counts MACs", "counts latency", "factor", "has scores",
    "mean score", "share of scores", "low scores", "middle scores", "high scores",
)  # fmt: skip
"""Entries of an observation, in order; all are near [-1, 1]. Without scores the last five are 0.

MACs and parameters are shares of the network's that would vanish with the group: dense, and as
pruned so far. `shrinks` is the logarithm of the stride of the layers that read the group; `left to
save` that of cost so far over cost asked for.
"""

Array = NDArray[np.float32]


class Decisions:
    """One episode: `observe` and `decide`, group by group, then `solution`.

    Args:
        groups: of the network.
        model: its costs.
        cf, metric, limits: as in `zoo.planning.solver.solve`.
        scores: one list per group, one number per channel; None to correct `equal`.
        ranking: what turns `scores` into widths; by default that of `BEST_RANKING`.

    Raises:
        FactorError: when the known policy cannot reach the factor.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        model: CostModel,
        cf: float,
        metric: str = "params",
        *,
        scores: Scores | None = None,
        ranking: Ranking | None = None,
        limits: Limits = FREE,
    ) -> None:
        self.model, self.cf, self.metric, self.limits = model, cf, metric, limits
        self.scores, self.ranking = scores, ranking or RANKINGS[BEST_RANKING[metric]]
        self.corrections: list[float] = []
        self.known = self._known()
        self._static = np.array(
            [_described(groups, index, model) for index in range(len(groups.groups))]
        )
        self._told = _summaries(scores) if scores else np.zeros((len(groups.groups), 5))
        self._target = model.total(model.sizes, metric) / cf

    @property
    def finished(self) -> bool:
        """Whether every group was decided on."""
        return len(self.corrections) == len(self.model.sizes)

    def decide(self, correction: float) -> None:
        """The correction of the next group; outside of [-1, 1] it is clipped."""
        self.corrections.append(min(1.0, max(-1.0, float(correction))))

    def observe(self) -> Array:
        """`FEATURES` of the group to decide on next; after the last, of the last."""
        group = min(len(self.corrections), len(self.model.sizes) - 1)
        widths = self._widths_so_far()
        so_far = [
            *_shares(self.model, widths, group),
            self.known.widths[group] / self.model.sizes[group],
            math.log(self.model.total(widths, self.metric) / self._target),
            self.corrections[-1] if self.corrections else 0.0,
        ]
        asked = [
            float(self.metric == "macs"),
            float(self.metric == "latency"),
            math.log2(self.cf) / 3,
            float(self.scores is not None),
        ]
        row = np.concatenate([self._static[group], so_far, asked, self._told[group]])
        return np.clip(row, -2.0, 2.0).astype(np.float32)

    def solution(self) -> Solution:
        """The widths that the corrections give at the factor."""
        factors = [math.exp(correction) for correction in self.corrections]
        if not any(self.corrections):
            return self.known
        if self.scores is None:
            return solve(
                self.model, scale_curve(factors, floor=1e-3), self.cf, self.metric, self.limits
            )
        return self._ranked(
            [
                [score * factor for score in own]
                for own, factor in zip(self._normalised, factors, strict=True)
            ]
        )

    def _known(self) -> Solution:
        if self.scores is None:
            return equal(self.model, self.cf, self.metric, 0, self.limits)
        return self._ranked(self._normalised)

    def _ranked(self, scores: Scores) -> Solution:
        ranking = replace(self.ranking, normalise=list)
        return ranking_solution(ranking, scores, self.model, self.cf, self.metric, self.limits)

    @cached_property
    def _normalised(self) -> Scores:
        assert self.scores is not None
        return [self.ranking.normalise(own) for own in self.scores]

    def _widths_so_far(self) -> tuple[int, ...]:
        """Those of the known policy, with the corrections so far applied to their keep ratios."""
        ratios = [
            width / size for width, size in zip(self.known.widths, self.model.sizes, strict=True)
        ]
        for group, correction in enumerate(self.corrections):
            ratios[group] = min(1.0, ratios[group] * math.exp(correction))
        return round_widths(self.model.sizes, ratios, self.limits)


def _described(groups: ChannelGroups, index: int, model: CostModel) -> list[float]:
    """What holds of a group whatever is pruned: the first 13 `FEATURES`."""
    group, count, largest = groups.groups[index], len(model.sizes), max(model.sizes)
    weights = {slot.tensor for slot in group.slots if slot.tensor in groups.positions}
    writers = [name for name in group.filters if name in weights]
    readers = sorted(weights.difference(writers))
    shapes = [groups.shapes[name] for name in sorted(weights)]
    at = _mean([groups.positions[name] for name in writers or readers])
    read_at = _mean([groups.positions[name] for name in readers or writers])
    return [
        math.log2(group.size) / 10,
        group.size / largest,
        (index + 1) / count,
        *_shares(model, model.sizes, index),
        math.log2(at) / 16,
        max((max(shape[2:], default=1) for shape in shapes), default=1) / 7,
        math.log2(at / read_at) / 4,
        float(any(len(shape) > 2 and shape[1] == 1 for shape in shapes)),
        float(any(len(groups.shapes[name]) == 2 for name in readers)),
        float(len(writers) > 1),
        math.log2(1 + len(writers)) / 4,
        math.log2(1 + len(readers)) / 4,
    ]


def _shares(model: CostModel, widths: Sequence[int], group: int) -> list[float]:
    """The shares of MACs and of parameters at `widths` that would vanish with the group."""
    whole = model(widths)
    without = model([0 if n == group else width for n, width in enumerate(widths)])
    return [1 - without.macs / max(1, whole.macs), 1 - without.params / max(1, whole.params)]


def _summaries(scores: Scores) -> NDArray[Any]:
    """Per group: log of its mean score over the network's, its share, and three quantiles."""
    means = [_mean(own) for own in scores]
    total = math.fsum(map(math.fsum, scores)) or 1.0
    typical = total / sum(map(len, scores))
    rows = []
    for own, mean in zip(scores, means, strict=True):
        largest = max(own) or 1.0
        low, middle, high = np.quantile(own, (0.1, 0.5, 0.9)) / largest
        relative = math.log10(max(mean / typical, 1e-6)) / 2
        rows.append([relative, math.fsum(own) / total, low, middle, high])
    return np.array(rows)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 1.0
