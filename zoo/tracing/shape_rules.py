"""Rules of the operators that move channel labels: cat, reshape, permute, slice, split, pad, ..."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.tracing.labels import FREE, Labels, Trace, Value, is_channels

__all__ = [
    "cat",
    "expand",
    "flip",
    "gather",
    "halve",
    "index",
    "movedim",
    "narrow",
    "pad",
    "parts",
    "permute",
    "repeat",
    "repeat_interleave",
    "reshape",
    "reshape_like",
    "roll",
    "select",
    "shuffle",
    "slice_",
    "split_with_sizes",
    "spread",
    "stack",
    "tensor_split",
    "transpose",
    "unbind",
    "unfold",
    "unlabelled",
]

Shape = tuple[int, ...]


def cat(trace: Trace, shape: Shape, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(shape)
    result: list[Labels | None] = []
    for d in range(len(shape)):
        rows = [tensor.labels[d] for tensor in tensors]
        if d == dim and any(is_channels(row) for row in rows):
            owned = []
            for tensor, row in zip(tensors, rows, strict=True):
                if not is_channels(row):
                    row = trace.fresh(tensor.shape[d])
                    trace.fix(row, "is concatenated with a tensor that belongs to no channel group")
                owned.append(row)
            result.append(np.concatenate(owned))
        else:
            result.append(_tied(trace, rows) if d != dim else None)
    return Value(shape, tuple(result))


def stack(trace: Trace, shape: Shape, tensors: Sequence[Value], dim: int = 0) -> Value:
    rows = [_tied(trace, column) for column in zip(*(t.labels for t in tensors), strict=True)]
    rows.insert(dim % len(shape), None)
    return Value(shape, tuple(rows))


def _tied(trace: Trace, rows: Sequence[Labels | None]) -> Labels | None:
    merged = rows[0]
    for row in rows[1:]:
        merged = trace.tie(merged, row)
    return merged


def reshape(trace: Trace, shape: Shape, x: Value, *rest: Any) -> Value:
    """Any change of shape that keeps the order of the elements.

    Old and new dimensions are matched in blocks of equal numbers of elements. Merging dimensions
    repeats or interleaves labels. Splitting one ties the j-th positions of all its parts.
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


def reshape_like(trace: Trace, shape: Shape, x: Value, other: Value) -> Value:
    """view_as and reshape_as: as long as `other` in every dimension, so both are cut together."""
    given = reshape(trace, shape, x)
    return Value(shape, tuple(map(trace.tie, given.labels, other.labels)))


def _merge(trace: Trace, labels: Sequence[Labels | None], sizes: Sequence[int]) -> Labels | None:
    """The labels of several dimensions flattened into one."""
    wide = [n for n, row in enumerate(labels) if is_channels(row) and sizes[n] > 1]
    if not wide:
        if math.prod(sizes) == 1:
            return next((row for row in labels if is_channels(row)), None)
        return FREE if all(labels[n] is FREE for n, s in enumerate(sizes) if s > 1) else None
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
    """The labels of one dimension that is split into dimensions of these sizes."""
    if not is_channels(labels):
        return [labels] * len(sizes)
    if math.prod(sizes) == 1:
        return [labels, *[None] * (len(sizes) - 1)][: len(sizes)]
    wide = [n for n, size in enumerate(sizes) if size > 1]
    if len(wide) == 1:
        return [labels if n == wide[0] else None for n in range(len(sizes))]
    table = labels.reshape(*[sizes[n] for n in wide])
    roots = np.vectorize(trace.find)(table)
    # Labels that do not vary along a dimension were repeated by a flattening, which is undone.
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


def expand(trace: Trace, shape: Shape, x: Value, *rest: Any, **options: Any) -> Value:
    """Dimensions of size 1 are repeated: all their positions are equal."""
    del trace, rest, options
    new = len(shape) - len(x.shape)
    rows = [x.labels[d] if size == x.shape[d] else FREE for d, size in enumerate(shape[new:])]
    return Value(shape, (*[FREE] * new, *rows))


def repeat(trace: Trace, shape: Shape, x: Value, *rest: Any) -> Value:
    """Copies one after the other; a repeated dimension of size 1 has equal positions."""
    del trace, rest
    new = len(shape) - len(x.shape)
    rows: list[Labels | None] = [FREE] * new
    for size, old, row in zip(shape[new:], x.shape, x.labels, strict=True):
        if is_channels(row):
            rows.append(np.tile(row, size // old))
        else:
            rows.append(FREE if old == 1 < size else row)
    return Value(shape, tuple(rows))


def repeat_interleave(
    trace: Trace, shape: Shape, x: Value, times: int, dim: int, **options: Any
) -> Value:
    del trace, options
    return _replaced(shape, x, dim, _spread(x.labels[dim], times))


def spread(trace: Trace, shape: Shape, x: Value, *rest: Any) -> Value:
    """Every channel becomes a block of channels: pixel_unshuffle and im2col."""
    del rest
    return _image(trace, shape, x, _spread(x.labels[1], shape[1] // x.shape[1]))


def gather(trace: Trace, shape: Shape, x: Value, *rest: Any) -> Value:
    """Every block of channels becomes one channel: pixel_shuffle and col2im."""
    del rest
    row = x.labels[1]
    if is_channels(row):
        block = x.shape[1] // shape[1]
        row = _tied(trace, [row[n::block] for n in range(block)])
    return _image(trace, shape, x, row)


def _spread(row: Labels | None, block: int) -> Labels | None:
    return np.repeat(row, block) if is_channels(row) else row


def _image(trace: Trace, shape: Shape, x: Value, row: Labels | None) -> Value:
    if max(len(shape), len(x.shape)) != 4:
        raise ValueError("these are not the pixels of a batch of images")
    for other in x.labels[2:]:
        trace.fix(other, "is rearranged with the pixels")
    return Value(shape, (None, row, *[None] * (len(shape) - 2)))


def _replaced(shape: Shape, x: Value, dim: int, row: Labels | None) -> Value:
    """`x` with other labels along one dimension."""
    rows = list(x.labels)
    rows[dim] = row
    return Value(shape, tuple(rows))


def shuffle(trace: Trace, shape: Shape, x: Value, groups: int) -> Value:
    """channel_shuffle: the j-th channels of all groups become neighbours and are tied."""
    row = x.labels[1]
    if is_channels(row):
        parts_ = np.split(row, groups)
        _tied(trace, parts_)
        row = np.stack(parts_, 1).ravel()
    return _replaced(shape, x, 1, row)


def halve(trace: Trace, shape: Shape, x: Value, dim: int = -1) -> Value:
    """glu: one half gates the other, so the halves are tied."""
    row = x.labels[dim]
    return _replaced(shape, x, dim, _tied(trace, np.split(row, 2)) if is_channels(row) else row)


def flip(trace: Trace, shape: Shape, x: Value, dims: Sequence[int]) -> Value:
    del trace
    rows = list(x.labels)
    for dim in dims:
        row = rows[dim]
        rows[dim] = row[::-1] if is_channels(row) else row
    return Value(shape, tuple(rows))


def roll(trace: Trace, shape: Shape, x: Value, _: Any, dims: Sequence[int] = ()) -> Value:
    for dim in dims or range(len(shape)):
        trace.fix(x.labels[dim], "is rolled by a number of positions")
    return Value(shape, x.labels)


def unlabelled(trace: Trace, shape: Shape, *rest: Any, **options: Any) -> Value:
    """A new tensor whose shape is an argument: no labels."""
    del trace, rest, options
    return Value(shape, (None,) * len(shape))


def permute(trace: Trace, shape: Shape, x: Value, dims: Sequence[int]) -> Value:
    del trace
    return Value(shape, tuple(x.labels[d] for d in dims))


def movedim(trace: Trace, shape: Shape, x: Value, source: Any, target: Any) -> Value:
    if isinstance(source, int):
        source, target = [source], [target]
    sources, targets = ([d % len(shape) for d in dims] for dims in (source, target))
    rest = (d for d in range(len(shape)) if d not in sources)
    moved = dict(zip(targets, sources, strict=True))
    return permute(
        trace, shape, x, [moved[d] if d in moved else next(rest) for d in range(len(shape))]
    )


def transpose(trace: Trace, shape: Shape, x: Value, a: int = -2, b: int = -1) -> Value:
    dims = list(range(len(shape)))
    dims[a], dims[b] = dims[b], dims[a]
    return permute(trace, shape, x, dims)


def slice_(
    trace: Trace,
    shape: Shape,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    row = x.labels[dim]
    if not is_channels(row):
        return _replaced(shape, x, dim, row)
    if shape[dim] == 1 < len(row):
        trace.fix(row, "is indexed by a position")
    elif step > 1 and len(row) % step == 0:  # `step` neighbours go together, or the slice moves
        _tied(trace, [row[n::step] for n in range(step)])
    elif step > 1:
        trace.fix(row, "is sliced with a step that does not divide its length")
    return _replaced(shape, x, dim, row[slice(start, end, step)])


def narrow(trace: Trace, shape: Shape, x: Value, dim: int, start: int, length: int) -> Value:
    return slice_(trace, shape, x, dim, start, start + length)


def parts(trace: Trace, shapes: Sequence[Shape], x: Value, _: Any, dim: int = 0) -> Any:
    """chunk and split by one number: equal parts are tied, unequal ones fixed."""
    row = x.labels[dim]
    if len({shape[dim] for shape in shapes}) > 1:
        trace.fix(row, "is split into unequal parts by a single number")
    return split_with_sizes(trace, shapes, x, _, dim)


def split_with_sizes(
    trace: Trace, shapes: Sequence[Shape], x: Value, _: Any, dim: int = 0
) -> tuple[Value, ...]:
    """The j-th channels of equal parts are tied; unequal parts are plain slices."""
    row = x.labels[dim]
    sizes = [shape[dim] for shape in shapes]
    result, first = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        labels = list(x.labels)
        if is_channels(row):
            labels[dim] = row[first : first + size]
            if len(set(sizes)) == 1:
                trace.tie(row[:size], labels[dim])
        result.append(Value(shape, tuple(labels)))
        first += size
    return tuple(result)


def tensor_split(trace: Trace, shapes: Sequence[Shape], x: Value, at: Any, dim: int = 0) -> Any:
    """Into a number of parts as chunk; otherwise at positions, which surgery does not move."""
    if isinstance(at, int):
        return parts(trace, shapes, x, at, dim)
    trace.fix(x.labels[dim], "is split at positions")
    return tuple(_replaced(shape, x, dim, None) for shape in shapes)


def select(trace: Trace, shape: Shape, x: Value, dim: int, position: int) -> Value:
    del position
    trace.fix(x.labels[dim], "is indexed by a position")
    rows = list(x.labels)
    del rows[dim]
    return Value(shape, tuple(rows))


def unbind(trace: Trace, shapes: Sequence[Shape], x: Value, dim: int = 0) -> Any:
    return tuple(select(trace, shape, x, dim, n) for n, shape in enumerate(shapes))


def index(trace: Trace, shape: Shape, x: Value, indices: Sequence[Value | None]) -> Value:
    """Advanced indexing: the indexed dimensions are fixed; the others keep their labels."""
    taken = [d for d, rows in enumerate(indices) if rows is not None]
    for d in taken:
        trace.fix(x.labels[d], "is indexed by a tensor of positions")
    kept = [x.labels[d] for d in range(len(x.shape)) if d not in taken]
    new = len(shape) - len(kept)
    adjacent = taken == list(range(taken[0], taken[-1] + 1))
    first = taken[0] if adjacent else 0
    return Value(shape, (*kept[:first], *[None] * new, *kept[first:]))


def unfold(trace: Trace, shape: Shape, x: Value, dim: int, *rest: Any) -> Value:
    """Windows along one dimension, which is fixed, in a new last dimension."""
    del rest
    trace.fix(x.labels[dim], "is cut into windows")
    rows = list(x.labels)
    rows[dim] = None
    return Value(shape, (*rows, None))


def pad(
    trace: Trace,
    shape: Shape,
    x: Value,
    widths: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Value:
    """Zero channels before and after get fresh labels, which are tied where they are added."""
    rows = list(x.labels)
    for n, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        dim = len(shape) - 1 - n
        row = rows[dim]
        if (before or after) and is_channels(row):
            if min(before, after) >= 0 and not value and mode in ("constant", 0):
                rows[dim] = np.concatenate([trace.fresh(before), row, trace.fresh(after)])
            else:
                trace.fix(row, "is padded with something other than zeros")
                rows[dim] = None
    return Value(shape, tuple(rows))
