"""The oracle: the worth of every single channel, by brute force; and how well criteria rank it.

The experiment of Molchanov et al., 2016, "Pruning convolutional neural networks for resource
efficient inference", section 3.1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from zoo.common.correlation import rank_correlation
from zoo.criteria.data_scores import Batches
from zoo.data.batches import check_labels
from zoo.errors import ZooError
from zoo.spec.groups import ChannelGroups
from zoo.surgery.masking import without
from zoo.surgery.surgery import named_tensors

__all__ = ["Correlation", "Oracle", "oracle", "spearman"]


@dataclass(frozen=True)
class Oracle:
    """The change of the mean cross-entropy when each unit alone is masked.

    Attributes:
        loss: of the whole network.
        changes: group name -> per unit, the loss without it minus `loss`.
    """

    loss: float
    changes: dict[str, tuple[float, ...]]

    @property
    def scores(self) -> list[list[float]]:
        """|change| per group and unit, like the scores of a criterion."""
        return [[abs(change) for change in changes] for changes in self.changes.values()]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a criterion with the oracle, in [-1, 1].

    Attributes:
        per_group: group name -> correlation; NaN if the criterion or the oracle ties all its units.
        overall: over all units, each group's scores divided by their l2 norm.
    """

    per_group: dict[str, float]
    overall: float

    @property
    def mean(self) -> float:
        """The mean over the groups whose correlation is not NaN."""
        known = [value for value in self.per_group.values() if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan


def oracle(module: nn.Module, groups: ChannelGroups, batches: Batches) -> Oracle:
    """The change of loss when each unit alone is masked: one evaluation per unit.

    Args:
        module: the network, not edited; a copy is evaluated in eval mode.
        groups: its channel groups.
        batches: (images, labels) on the module's device.

    Raises:
        DataError: when a label does not fit the network's outputs.
        ZooError: when there are no batches.
    """
    batches = list(batches)
    if not batches:
        raise ZooError("The oracle needs data, and there are no batches.")
    network = copy.deepcopy(module).eval()
    tensors = named_tensors(network)
    changes: dict[str, tuple[float, ...]] = {}
    with torch.no_grad():
        loss = _loss(network, batches)
        for group in groups.groups:
            losses = []
            for unit in range(group.size):
                with without(tensors, group, [unit]):
                    losses.append(_loss(network, batches))
            changes[group.name] = tuple(without - loss for without in losses)
    return Oracle(loss, changes)


def _loss(network: nn.Module, batches: Batches) -> float:
    total, count = 0.0, 0
    for images, labels in batches:
        logits = network(images).double()
        check_labels(labels, logits)
        total += functional.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    return total / count


def spearman(scores: Sequence[Sequence[float]], oracle: Oracle) -> Correlation:
    """Spearman's rank correlation of `scores`, per group and channel, with |change of loss|.

    For `overall`, a group's scores are divided by their l2 norm first (Molchanov et al., 2016,
    section 2.2); the oracle's are not.
    """
    truth = [np.array(row) for row in oracle.scores]
    given = [np.array(row, dtype=float) for row in scores]
    per_group = {
        name: rank_correlation(row, changes)
        for name, row, changes in zip(oracle.changes, given, truth, strict=True)
    }
    normalised = [row / (np.linalg.norm(row) or 1) for row in given]
    return Correlation(
        per_group, rank_correlation(np.concatenate(normalised), np.concatenate(truth))
    )
