"""What the agent sees: a float32 vector in [0, 1], of one length for every step of a network.

The vector that precedes the decision on group t holds, in this order: the one-hot index of t and
four descriptors of group t (`describe`), `SUMMARY` numbers on the Taylor features of group t - 1 as
pruned (`summarise`; before the first decision those of the last group, paper section 4.1), the
running compression and the previous keep ratio.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zoo.cost import CostModel

__all__ = ["QUANTILES", "SUMMARY", "describe", "length", "observe", "summarise"]

QUANTILES = 8
SUMMARY = QUANTILES + 1

Array = NDArray[np.float32]


def length(groups: int) -> int:
    """Entries of the observation of a network with this many channel groups."""
    return groups + 4 + SUMMARY + 2


def describe(model: CostModel) -> Array:
    """One row per group: its one-hot index, relative size, shares of parameters and MACs, depth.

    The shares are of the dense network's cost that vanishes with the whole group; one layer belongs
    to the group of its inputs and to that of its outputs.
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
        features: E|∂ε/∂L · L| of the dense network, one vector per group, one entry per channel.
        group: the group to summarise.
        kept: boolean, per channel; features of pruned channels count as 0 (paper, equation 9).

    Returns:
        The quantiles over the channels, relative to the group's largest dense feature, then the
        mean over the channels, relative to the largest dense mean of any group.
    """
    own = features[group]
    masked = np.where(kept, own, 0.0)
    largest = max(float(own.max()), 1e-12)
    heaviest = max(max(float(layer.mean()) for layer in features), 1e-12)
    quantiles = np.quantile(masked / largest, np.linspace(0, 1, QUANTILES))
    return np.append(quantiles, masked.mean() / heaviest).astype(np.float32)


def observe(
    descriptors: Array, step: int, summary: Array, compression: float, last: float
) -> Array:
    """The observation before the decision on group `step`; after the last one, that of group 0."""
    row = descriptors[step % len(descriptors)]
    vector = np.concatenate([row, summary, [compression, last]])
    return np.clip(vector, 0.0, 1.0).astype(np.float32)
