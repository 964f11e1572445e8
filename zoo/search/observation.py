"""What the agent observes: a float32 vector in [0, 1], equally long at every step of a network.

The vector before the decision on group t holds, in this order: the one-hot index of t and four
descriptors of group t (`describe`); a view of the Taylor features of group t - 1 as pruned
(`VIEWS`; before the first decision those of the last group, paper section 4.1); the compression so
far; the previous keep ratio; and, if several are searched for at once, the asked factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from zoo.spec.cost import CostModel

__all__ = ["QUANTILES", "VIEWS", "describe", "observe", "pad", "summarise"]

QUANTILES = 8

Array = NDArray[np.float32]
View = Callable[[Sequence[NDArray], int, NDArray], Array]


def describe(model: CostModel) -> Array:
    """One row per group: its one-hot index, relative size, shares of parameters and MACs, depth.

    A share is the part of the dense network's cost that vanishes with the whole group; a layer
    counts for the group of its inputs and for that of its outputs.
    """
    count = len(model.sizes)
    rows = []
    for group, size in enumerate(model.sizes):
        without = model([0 if i == group else n for i, n in enumerate(model.sizes)])
        params = 1 - without.params / model.dense.params
        macs = 1 - without.macs / model.dense.macs
        rows.append([size / max(model.sizes), params, macs, (group + 1) / count])
    return np.hstack([np.eye(count), np.array(rows)]).astype(np.float32)


def summarise(features: Sequence[NDArray], group: int, kept: NDArray) -> Array:
    """The features of one group as `QUANTILES` quantiles and its weight in the network.

    Args:
        features: E|∂ε/∂L · L| of a network, one vector per group, one entry per channel.
        group: the group to summarise.
        kept: boolean, per channel; features of pruned channels count as 0 (paper, equation 9).

    Returns:
        The quantiles over the channels, relative to the group's largest feature, then the mean over
        the channels, relative to the largest mean of any group.
    """
    heaviest = max(max(float(layer.mean()) for layer in features), 1e-12)
    quantiles = np.quantile(_masked(features[group], kept), np.linspace(0, 1, QUANTILES))
    mean = np.where(kept, features[group], 0.0).mean()
    return np.append(quantiles, mean / heaviest).astype(np.float32)


def pad(features: Sequence[NDArray], group: int, kept: NDArray) -> Array:
    """The features of one group, channel by channel (paper, equation 9); arguments as `summarise`.

    Returns:
        One entry per channel, relative to the group's largest feature; zeros up to the length of
        the network's largest group.
    """
    vector = np.zeros(max(map(len, features)), dtype=np.float32)
    vector[: len(kept)] = _masked(features[group], kept)
    return vector


VIEWS: dict[str, View] = {"summary": summarise, "raw": pad}
"""Name -> the function that gives this view of a group's features."""


def observe(descriptors: Array, step: int, view: Array, rest: Sequence[float]) -> Array:
    """The observation before the decision on group `step`; after the last one, that of group 0."""
    row = descriptors[step % len(descriptors)]
    return np.clip(np.concatenate([row, view, rest]), 0.0, 1.0).astype(np.float32)


def _masked(features: NDArray, kept: NDArray) -> NDArray:
    return np.where(kept, features, 0.0) / max(float(features.max()), 1e-12)
