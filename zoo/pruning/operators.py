"""How channel labels pass through operators: one small function per ATen operator.

A `Value` is an abstract tensor: per dimension one integer label per position, or None where nothing
prunable lives (batch, image height, ...). Rules move labels, tie those that must be cut together,
fix those that cannot be cut, and note which weights produce channels. Adding an operator is adding
a function, or a name to a list, in `RULES`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.errors import GraphError

__all__ = ["RULES", "Labels", "Trace", "Value"]

Labels = np.ndarray
"""int64, one label per position of one dimension."""


@dataclass(frozen=True)
class Value:
    """An abstract tensor; `name` is set for parameters and buffers."""

    shape: tuple[int, ...]
    labels: tuple[Labels | None, ...]
    name: str = ""


class Trace:
    """The labels of one interpreted program: a union-find, and what the rules noted."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self.fixed: dict[int, str] = {}
        self.positions: dict[str, int] = defaultdict(int)
        self.producers: dict[str, Labels] = {}

    def fresh(self, count: int) -> Labels:
        """`count` new labels."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, label: int) -> int:
        """The representative of the set that `label` belongs to."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def tie(self, left: Labels | None, right: Labels | None) -> Labels | None:
        """Cut these positions together, pairwise; labels met by none are fixed."""
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
        """These positions cannot be cut."""
        if labels is not None:
            self.fixed.update(dict.fromkeys(labels.tolist(), reason))

    def produce(self, weight: Value, labels: Labels) -> None:
        """`weight` computes the channels with these labels, from nothing that has them."""
        if not weight.name:
            self.fix(labels, "is produced by a weight that is computed, not stored")
        elif weight.name not in self.producers:
            self.producers[weight.name] = labels


Shape = tuple[int, ...]
Rule = Callable[..., "Value | tuple[Value, ...]"]


def _convolution(
    trace: Trace,
    shape: Shape,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: object = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: int = 1,
) -> Value:
    del stride, padding, dilation
    if weight.name:
        trace.positions[weight.name] += math.prod(shape[2:])
    outputs, fan_in = weight.labels[0], weight.labels[1]
    if outputs is None or fan_in is None:
        raise GraphError("a convolution whose weight has no labels")
    channels = x.labels[1]
    if groups > 1 and weight.shape[1] == 1:  # depthwise: the output channels are the input's
        repeated = None if channels is None else np.repeat(channels, weight.shape[0] // groups)
        trace.tie(outputs, repeated)
    else:
        if channels is None:
            trace.fix(fan_in, "")
        else:
            trace.tie(channels, np.tile(fan_in, groups))
        trace.tie(outputs, np.tile(outputs[: len(outputs) // groups], groups))
        trace.produce(weight, outputs)
    if bias is not None:
        trace.tie(outputs, bias.labels[0])
    return Value(shape, (None, outputs, *[None] * (len(shape) - 2)))


def _linear(
    trace: Trace, shape: Shape, x: Value, weight: Value, bias: Value | None = None
) -> Value:
    if weight.name:
        trace.positions[weight.name] += math.prod(x.shape[1:-1])
    outputs, fan_in = weight.labels
    if outputs is None or fan_in is None:
        raise GraphError("a dense layer whose weight has no labels")
    if x.labels[-1] is None:
        trace.fix(fan_in, "")
    else:
        trace.tie(x.labels[-1], fan_in)
    trace.produce(weight, outputs)
    if bias is not None:
        trace.tie(outputs, bias.labels[0])
    return Value(shape, (*x.labels[:-1], outputs))


def _batch_norm(trace: Trace, shape: Shape, x: Value, *tensors: Any) -> Value:
    for tensor in tensors:
        if isinstance(tensor, Value):
            trace.tie(x.labels[1], tensor.labels[0])
    return Value(shape, x.labels)


def _same(trace: Trace, shape: Shape, x: Value, *rest: Any, **options: Any) -> Value:
    """Position by position, or pooling over dimensions that carry no labels."""
    del trace, rest, options
    for old, new, labels in zip(x.shape, shape, x.labels, strict=True):
        if labels is not None and old != new:
            raise GraphError("an operator that resizes a dimension with channels in it")
    return Value(shape, x.labels)


def _broadcast(trace: Trace, shape: Shape, *operands: Any, **options: Any) -> Value:
    """Elementwise over several tensors: aligned from the last dimension, tied where both vary."""
    del options
    values = [operand for operand in operands if isinstance(operand, Value)]
    result: list[Labels | None] = []
    for dim in range(-len(shape), 0):
        rows = [v.labels[dim] for v in values if len(v.shape) >= -dim and v.shape[dim] != 1]
        if not rows and any(len(v.shape) >= -dim for v in values):
            rows = [v.labels[dim] for v in values if len(v.shape) >= -dim][:1]
        merged = rows[0] if rows else None
        for row in rows[1:]:
            merged = trace.tie(merged, row)
        result.append(merged)
    return Value(shape, tuple(result))


def _cat(trace: Trace, shape: Shape, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(shape)
    result: list[Labels | None] = []
    for d in range(len(shape)):
        rows = [tensor.labels[d] for tensor in tensors]
        if d == dim:
            if all(row is None for row in rows):
                result.append(None)
                continue
            parts = []
            for tensor, row in zip(tensors, rows, strict=True):
                if row is None:
                    row = trace.fresh(tensor.shape[d])
                    trace.fix(row, "is concatenated with a tensor that no channel group owns")
                parts.append(row)
            result.append(np.concatenate(parts))
        else:
            merged = rows[0]
            for row in rows[1:]:
                merged = trace.tie(merged, row)
            result.append(merged)
    return Value(shape, tuple(result))


def _reshape(trace: Trace, shape: Shape, x: Value, *rest: Any) -> Value:
    """Any change of shape that keeps the order of the elements.

    The dimensions are matched in blocks of equal products. A block that merges repeats or
    interleaves labels; one that splits ties the j-th position of every part and keeps the parts.
    """
    del rest
    result: list[Labels | None] = []
    i = j = 0
    while i < len(x.shape) or j < len(shape):
        old: list[int] = []
        new: list[int] = []
        size_old = size_new = 1
        while not old or not new or size_old != size_new:
            if (size_old <= size_new and i < len(x.shape)) or j >= len(shape):
                if i >= len(x.shape):
                    break
                old.append(i)
                size_old *= x.shape[i]
                i += 1
            else:
                new.append(j)
                size_new *= shape[j]
                j += 1
        merged = _merge(trace, [x.labels[d] for d in old], [x.shape[d] for d in old])
        result += _split(trace, merged, [shape[d] for d in new])
    return Value(shape, tuple(result))


def _merge(trace: Trace, labels: Sequence[Labels | None], sizes: Sequence[int]) -> Labels | None:
    """The labels of several dimensions flattened into one."""
    wide = [n for n, row in enumerate(labels) if row is not None and sizes[n] > 1]
    if not wide:
        return next((row for row in labels if row is not None), None)
    if len(wide) > 1:
        for n in wide:
            trace.fix(labels[n], "is flattened together with another channel dimension")
        return None
    at = wide[0]
    row = labels[at]
    assert row is not None
    before, after = math.prod(sizes[:at]), math.prod(sizes[at + 1 :])
    return np.tile(np.repeat(row, after), before)


def _split(trace: Trace, labels: Labels | None, sizes: Sequence[int]) -> list[Labels | None]:
    """One dimension's labels spread over dimensions of these sizes."""
    if labels is None:
        return [None] * len(sizes)
    if math.prod(sizes) == 1:
        return [labels, *[None] * (len(sizes) - 1)][: len(sizes)]
    wide = [n for n, size in enumerate(sizes) if size > 1]
    if len(wide) == 1:
        return [labels if n == wide[0] else None for n in range(len(sizes))]
    table = labels.reshape(*[sizes[n] for n in wide])
    roots = np.vectorize(trace.find)(table)
    # A dimension along which the labels do not change only repeats them: undo a flattening.
    varying = [axis for axis in range(len(wide)) if (roots != np.take(roots, [0], axis=axis)).any()]
    inner = varying[-1] if varying else len(wide) - 1
    if len(varying) <= 1:
        index = tuple(slice(None) if axis == inner else 0 for axis in range(len(wide)))
        return [table[index] if n == wide[inner] else None for n in range(len(sizes))]
    if inner != len(wide) - 1:
        trace.fix(labels, "is split into a shape that no rule covers")
        return [None] * len(sizes)
    flat = table.reshape(-1, sizes[wide[inner]])
    for part in flat[1:]:
        trace.tie(flat[0], part)
    return [flat[0] if n == wide[inner] else None for n in range(len(sizes))]


def _permute(trace: Trace, shape: Shape, x: Value, dims: Sequence[int]) -> Value:
    del trace
    return Value(shape, tuple(x.labels[d] for d in dims))


def _transpose(trace: Trace, shape: Shape, x: Value, a: int, b: int) -> Value:
    dims = list(range(len(shape)))
    dims[a], dims[b] = dims[b], dims[a]
    return _permute(trace, shape, x, dims)


def _slice(
    trace: Trace,
    shape: Shape,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    del trace
    labels = list(x.labels)
    row = labels[dim]
    labels[dim] = None if row is None else row[slice(start, end, step)]
    return Value(shape, tuple(labels))


def _parts(trace: Trace, shapes: Sequence[Shape], x: Value, _: Any, dim: int = 0) -> Any:
    """chunk and split: equal parts tie their j-th channels, unequal ones are plain slices."""
    row = x.labels[dim]
    sizes = [shape[dim] for shape in shapes]
    parts, first = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        labels = list(x.labels)
        labels[dim] = None if row is None else row[first : first + size]
        if row is not None and len(set(sizes)) == 1:
            trace.tie(row[:size], labels[dim])
        parts.append(Value(shape, tuple(labels)))
        first += size
    return tuple(parts)


def _reduce(
    trace: Trace, shape: Shape, x: Value, dims: Iterable[int] | int | None = None, *rest: Any,
    **options: Any,
) -> Value:  # fmt: skip
    keepdim = bool(rest[0]) if rest else bool(options.get("keepdim", False))
    wanted = range(len(x.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(x.shape) for d in wanted}
    for d in gone:
        if x.shape[d] > 1:
            trace.fix(x.labels[d], "is reduced over")
    if keepdim:
        kept = [None if d in gone else row for d, row in enumerate(x.labels)]
    else:
        kept = [row for d, row in enumerate(x.labels) if d not in gone]
    return Value(shape, tuple(kept))


def _names(rule: Rule, *operators: str) -> dict[str, Rule]:
    return dict.fromkeys(operators, rule)


RULES: dict[str, Rule] = {
    **_names(_convolution, "conv1d", "conv2d", "conv3d"),
    **_names(_linear, "linear"),
    **_names(_batch_norm, "batch_norm"),
    **_names(
        _same,
        *("relu", "relu_", "hardtanh", "hardtanh_", "silu", "silu_", "sigmoid", "sigmoid_", "gelu"),
        *("hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "tanh", "leaky_relu", "elu"),
        *("leaky_relu_", "elu_", "mish", "mish_", "clamp", "clamp_min", "neg", "sqrt", "rsqrt"),
        *("dropout", "dropout_", "feature_dropout", "clone", "contiguous", "detach", "alias", "to"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
        *("upsample_nearest2d", "upsample_bilinear2d"),
    ),
    **_names(_broadcast, "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum"),
    **_names(_cat, "cat"),
    **_names(
        _reshape, "flatten", "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "unflatten"
    ),
    **_names(_permute, "permute"),
    **_names(_transpose, "transpose"),
    **_names(_slice, "slice"),
    **_names(_parts, "chunk", "split", "split_with_sizes"),
    **_names(_reduce, "mean", "sum", "amax"),
}
"""ATen operator name (without overload) -> rule."""
