"""Channel labels: one integer label for every position of a dimension.

A `Value` is an abstract tensor: a shape and labels, no numbers. A row holds the labels of one
dimension. It is None for dimensions without channels (batch, image height, ...), and `FREE` where
all positions are equal, as after `expand`, so that any may be removed. A `Trace` knows which labels
are tied (cut together) and fixed (never cut), and what the operators' rules recorded.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

__all__ = ["FREE", "Labels", "Trace", "Value", "is_channels", "parts_of", "rows_of"]

Labels = np.ndarray
"""int64, (size of the dimension,): one label for each position."""

FREE: Labels = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Value:
    """An abstract tensor; `name` is the full name of a parameter or buffer, else ""."""

    shape: tuple[int, ...]
    labels: tuple[Labels | None, ...]
    name: str = ""


def is_channels(row: Labels | None) -> TypeGuard[Labels]:
    """Whether the row has labels: it is neither None nor `FREE`."""
    return row is not None and len(row) > 0


def parts_of(value: Any) -> tuple[Any, ...]:
    """The outputs of an operator as a tuple."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def rows_of(value: Any) -> Iterator[Labels | None]:
    """The rows of one abstract tensor, or of a tuple or list of them."""
    for part in parts_of(value):
        if isinstance(part, Value):
            yield from part.labels


class Trace:
    """The labels of one interpreted program: a union-find, and what the rules recorded.

    Attributes:
        batch: images in the traced batch.
        fixed: label -> why it cannot be cut.
        elements: stored tensor -> how many elements it has.
        macs: weight -> MACs per image, which follow its widths; "" -> those that no plan changes.
        per_item: whether the operator whose rule is running works for every image anew.
        producers: (weight, its output dimension) -> the labels of the channels that it computes.
        where: node, module and line of the operator whose rule is running; "" if none is.
    """

    def __init__(self, batch: int = 1) -> None:
        self._parent: list[int] = []
        self._starts: list[int] = []
        self._tensors: list[tuple[str, int]] = []
        self.batch = batch
        self.fixed: dict[int, str] = {}
        self.elements: dict[str, int] = {}
        self.macs: dict[str, int] = defaultdict(int)
        self.per_item = True
        self.producers: dict[tuple[str, int], Labels] = {}
        self.where = ""

    def fresh(self, count: int, tensor: str = "", dim: int = 0) -> Labels:
        """`count` new labels; if `tensor` is named, those of its dimension `dim`."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        self._starts.append(first)
        self._tensors.append((tensor, dim))
        return np.arange(first, first + count)

    def home(self, row: Labels | None) -> tuple[str, int]:
        """The stored tensor and dimension that a row's labels were created for; else ("", 0)."""
        if not is_channels(row):
            return "", 0
        first, last = self._home(int(row[0])), self._home(int(row[-1]))
        return first if first == last else ("", 0)

    def _home(self, label: int) -> tuple[str, int]:
        return self._tensors[bisect_right(self._starts, label) - 1]

    def find(self, label: int) -> int:
        """The representative of the set that `label` belongs to."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def tie(self, left: Labels | None, right: Labels | None) -> Labels | None:
        """Tie two rows pairwise, and return the merged one; labels that meet None are fixed."""
        if left is FREE or right is FREE:
            return right if left is FREE else left
        if left is None or right is None:
            known = left if right is None else right
            if known is not None and len(known) > 1:
                self.fix(known, "is combined with a tensor that belongs to no channel group")
            return known
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            root_a, root_b = self.find(a), self.find(b)
            if root_a != root_b:
                self._parent[max(root_a, root_b)] = min(root_a, root_b)
        return left

    def fix(self, labels: Labels | None, reason: str) -> None:
        """Mark labels as never to be cut. `where` is added to the reason; "" means by design."""
        if labels is not None:
            reason = f"{reason}, at {self.where}" if reason and self.where else reason
            self.fixed.update(dict.fromkeys(labels.tolist(), reason))

    def fixed_roots(self) -> set[int]:
        """The representatives of all labels that are never to be cut."""
        return {self.find(label) for label in self.fixed}

    def produce(self, labels: Labels) -> None:
        """Record that a weight produces channels: `labels` are its own, and its input lacks them.

        The weight may be computed from a stored one, as in weight standardisation.
        """
        home = self.home(labels)
        if home == ("", 0):
            self.fix(labels, "is produced by a weight that is computed, not stored")
        else:
            self.producers.setdefault(home, labels)

    def count(self, weight: Value, positions: int) -> None:
        """Record that `weight` is applied at so many output positions of the batch, for MACs.

        A weight that is computed from stored ones counts as their work, by its filters.
        """
        row = weight.labels[0]
        name = weight.name or self.home(row)[0]
        macs = math.prod(weight.shape) * positions
        if name or not is_channels(row):
            self.add_macs(macs, name)
            return
        homes = Counter(self._home(label)[0] for label in row.tolist())
        for home, filters in homes.items():
            self.add_macs(macs * filters // len(row), home)

    def add_macs(self, macs: int, weight: str = "") -> None:
        """Record MACs of the batch: those of a stored `weight`, or such as no plan changes."""
        self.macs[weight] += macs // self.batch if self.per_item else macs

    def counted(self) -> tuple[dict[str, int], int]:
        """Weight -> output positions per image, and the MACs per image that no plan changes."""
        fixed = self.macs[""]
        positions = {}
        for name, macs in self.macs.items():
            if name:
                positions[name], rest = divmod(macs, self.elements[name])
                fixed += rest
        return positions, fixed
