"""Channel labels: an abstract tensor has one integer label per position of a dimension.

A `Value` is an abstract tensor. A row of it is the labels of one dimension: None where nothing
prunable lives (batch, image height, ...), and `FREE` where all positions are alike, as after
`expand`, so that any of them may go. A `Trace` knows which labels are tied, which are fixed, and
what the operators noted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

__all__ = ["FREE", "Labels", "Trace", "Value", "is_channels", "parts_of", "rows_of"]

Labels = np.ndarray
"""int64, one label per position of one dimension."""

FREE: Labels = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Value:
    """An abstract tensor; `name` is set for parameters and buffers."""

    shape: tuple[int, ...]
    labels: tuple[Labels | None, ...]
    name: str = ""


def is_channels(row: Labels | None) -> TypeGuard[Labels]:
    """Whether a dimension with this row has channels of its own in it."""
    return row is not None and len(row) > 0


def parts_of(value: Any) -> tuple[Any, ...]:
    """What an operator gives, one thing or several."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def rows_of(value: Any) -> Iterator[Labels | None]:
    """The rows of one abstract tensor, or of several."""
    for part in parts_of(value):
        if isinstance(part, Value):
            yield from part.labels


class Trace:
    """The labels of one interpreted program: a union-find, and what the rules noted.

    Attributes:
        batch: images in the traced batch.
        fixed: label -> why it cannot be cut.
        positions: weight -> output positions of one image, for MACs.
        fixed_macs: multiply-accumulates of one image between activations, which no plan changes.
        producers: weight and its dimension of outputs -> the labels of the channels it computes.
        where: node, module and line of the operator whose rule is at work, if one is.
    """

    def __init__(self, batch: int = 1) -> None:
        self._parent: list[int] = []
        self._starts: list[int] = []
        self._tensors: list[tuple[str, int]] = []
        self.batch = batch
        self.fixed: dict[int, str] = {}
        self.positions: dict[str, int] = defaultdict(int)
        self.fixed_macs = 0
        self.producers: dict[tuple[str, int], Labels] = {}
        self.where = ""

    def fresh(self, count: int, tensor: str = "", dim: int = 0) -> Labels:
        """`count` new labels, of one dimension of a stored tensor if it is named."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        self._starts.append(first)
        self._tensors.append((tensor, dim))
        return np.arange(first, first + count)

    def home(self, row: Labels | None) -> tuple[str, int]:
        """The stored tensor and its dimension that a row was made for; ("", 0) if there is none."""
        if not is_channels(row):
            return "", 0
        first = self._tensors[bisect_right(self._starts, int(row[0])) - 1]
        last = self._tensors[bisect_right(self._starts, int(row[-1])) - 1]
        return first if first == last else ("", 0)

    def find(self, label: int) -> int:
        """The representative of the set that `label` belongs to."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def tie(self, left: Labels | None, right: Labels | None) -> Labels | None:
        """Cut these positions together, pairwise; labels met by none are fixed."""
        if left is FREE or right is FREE:
            return right if left is FREE else left
        if left is None or right is None:
            known = left if right is None else right
            if known is not None and len(known) > 1:
                self.fix(known, "is combined with a tensor that no channel group owns")
            return known
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            root_a, root_b = self.find(a), self.find(b)
            if root_a != root_b:
                self._parent[max(root_a, root_b)] = min(root_a, root_b)
        return left

    def fix(self, labels: Labels | None, reason: str) -> None:
        """These positions cannot be cut, for a reason that lies at `where`; "" is by design."""
        if labels is not None:
            reason = f"{reason}, at {self.where}" if reason and self.where else reason
            self.fixed.update(dict.fromkeys(labels.tolist(), reason))

    def produce(self, labels: Labels) -> None:
        """A weight computes the channels with these labels, its own, from nothing that has them.

        The weight may itself be computed from a stored one, as by weight standardisation.
        """
        home = self.home(labels)
        if home == ("", 0):
            self.fix(labels, "is produced by a weight that is computed, not stored")
        else:
            self.producers.setdefault(home, labels)

    def count(self, weight: Value, positions: int) -> None:
        """The operator multiplies every element of `weight` at this many positions of the batch."""
        name = weight.name or self.home(weight.labels[0])[0]
        if name:
            self.positions[name] += positions // self.batch
