"""How channel labels pass through operators: one small function per ATen operator.

Rules move labels, tie those that must be cut together, fix those that cannot be cut, and record
which weights produce channels. To add an operator, add a function or a name to `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from zoo.tracing import layer_rules, shape_rules
from zoo.tracing.labels import Labels, Trace, Value, is_channels

__all__ = ["CHANNEL_WISE", "RULES", "pointwise"]

Shape = tuple[int, ...]
Rule = Callable[..., "Value | tuple[Value, ...]"]


def _elementwise(trace: Trace, shape: Shape, x: Value, *rest: Any, **options: Any) -> Value:
    """Elementwise on one tensor: the labels stay."""
    del trace, rest, options
    return Value(shape, x.labels)


def _windowed(
    dims: int, trace: Trace, shapes: Any, x: Value, *rest: Any, **options: Any
) -> Value | tuple[Value, ...]:
    """Pooling and resizing over the last `dims` dimensions, with or without returned indices."""
    del rest, options
    for row in x.labels[-dims:]:
        trace.fix(row, "is pooled over")
    rows = (*x.labels[:-dims], *[None] * dims)
    if isinstance(shapes, list):
        return tuple(Value(shape, rows) for shape in shapes)
    return Value(shapes, rows)


def pointwise(trace: Trace, shape: Shape, *operands: Any, **options: Any) -> Value:
    """Elementwise on several tensors, broadcast: rows are tied where neither has size 1."""
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


def _unpooled(dims: int, trace: Trace, shape: Shape, x: Value, at: Value, *rest: Any) -> Value:
    """Max unpooling: the indices `at` are per channel, so they are tied with `x`."""
    rows = _windowed(dims, trace, shape, pointwise(trace, x.shape, x, at), *rest)
    assert isinstance(rows, Value)
    return rows


def _sampled(trace: Trace, shape: Shape, x: Value, grid: Value, *rest: Any) -> Value:
    """Every channel sampled at the coordinates in `grid`, (N, ..., coordinates)."""
    for row in grid.labels:
        trace.fix(row, "gives the coordinates of grid_sampler")
    rows = _windowed(len(shape) - 2, trace, shape, x, *rest)
    assert isinstance(rows, Value)
    return rows


def _reversed(trace: Trace, shape: Shape, x: Value) -> Value:
    return shape_rules.permute(trace, shape, x, range(len(shape))[::-1])


def _reduce(
    trace: Trace, shape: Shape, x: Value, dims: Iterable[int] | int | None = None, *rest: Any,
    **options: Any,
) -> Value:  # fmt: skip
    """Mean, sum, ...; over channels too, of which the pruned network has fewer."""
    del trace, rest, options
    wanted = range(len(x.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(x.shape) for d in wanted}
    if len(shape) == len(x.shape):  # keepdim
        kept = [None if d in gone else row for d, row in enumerate(x.labels)]
    else:
        kept = [row for d, row in enumerate(x.labels) if d not in gone]
    return Value(shape, tuple(kept))


def _extreme(trace: Trace, shapes: Any, x: Value, *rest: Any, **options: Any) -> Any:
    """max and min: of all elements, of two tensors, or along a dimension, with indices.

    Indices of channels are None: they would change with surgery.
    """
    if not isinstance(shapes, list):
        pair = rest and isinstance(rest[0], Value)
        return (pointwise if pair else _reduce)(trace, shapes, x, *rest, **options)
    best = _reduce(trace, shapes[0], x, *rest, **options)
    dim = rest[0] if rest else options["dim"]
    return best, None if is_channels(x.labels[dim]) else Value(shapes[1], best.labels)


def _position(
    trace: Trace, shape: Shape, x: Value, dim: int | None = None, *rest: Any, **options: Any
) -> Value:
    """argmax, argmin: channels searched are fixed, as surgery changes their positions."""
    for row in x.labels if dim is None else (x.labels[dim],):
        trace.fix(row, "is searched for a position (argmax, argmin)")
    return _reduce(trace, shape, x, dim, *rest, **options)


def _ordered(
    trace: Trace, shapes: Any, x: Value, dim: int = -1, *rest: Any, **options: Any
) -> Value | tuple[Value, ...]:
    """Elementwise except for one dimension, whose order matters: it is fixed."""
    del rest
    trace.fix(x.labels[options.get("dim", dim)], "is accumulated or sorted in order")
    if isinstance(shapes, list):
        return tuple(Value(shape, x.labels) for shape in shapes)
    return Value(shapes, x.labels)


def _similarity(trace: Trace, shape: Shape, x: Value, y: Value, dim: int = 1, *_: Any) -> Value:
    dim %= len(x.shape)
    both = pointwise(trace, (*shape[:dim], x.shape[dim], *shape[dim:]), x, y)
    return _reduce(trace, shape, both, dim)


def _norm(
    trace: Trace, shape: Shape, x: Value, order: float = 2, *rest: Any, **options: Any
) -> Value:
    del order
    return _reduce(trace, shape, x, *rest, **options)


def _softmax(trace: Trace, shape: Shape, x: Value, dim: int, *rest: Any, **options: Any) -> Value:
    del rest, options
    trace.fix(x.labels[dim], "is normalised over by a softmax")
    return Value(shape, x.labels)


def _names(rule: Rule, *operators: str) -> dict[str, Rule]:
    return dict.fromkeys(operators, rule)


RULES: dict[str, Rule] = {
    **_names(layer_rules.convolution, "conv1d", "conv2d", "conv3d"),
    **_names(layer_rules.transposed_convolution, "conv_transpose1d", "conv_transpose2d"),
    **_names(layer_rules.transposed_convolution, "conv_transpose3d"),
    **_names(layer_rules.linear, "linear"),
    **_names(layer_rules.batch_norm, "batch_norm", "instance_norm"),
    **_names(layer_rules.layer_norm, "layer_norm", "rms_norm"),
    **_names(layer_rules.group_norm, "group_norm"),
    **_names(
        _elementwise,
        *("gelu_", "hardswish", "hardswish_", "mish_", "log_sigmoid", "threshold_", "rrelu"),
        *("rrelu_", "relu6_", "elu_", "celu_", "selu_", "fill_", "zero_", "zeros_like"),
        *("ones_like", "full_like", "dropout", "dropout_", "feature_dropout", "feature_dropout_"),
        *("alpha_dropout", "feature_alpha_dropout", "clone", "contiguous", "detach", "alias"),
        *("to", "_to_copy", "type_as", "float"),
    ),
    **_names(partial(_windowed, 1), "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d"),
    **_names(partial(_windowed, 1), "adaptive_max_pool1d", "max_pool1d_with_indices"),
    **_names(partial(_windowed, 1), "upsample_nearest1d", "_upsample_nearest_exact1d"),
    **_names(partial(_windowed, 1), "upsample_linear1d"),
    **_names(partial(_windowed, 2), "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
    **_names(partial(_windowed, 2), "adaptive_max_pool2d", "max_pool2d_with_indices"),
    **_names(partial(_windowed, 2), "upsample_nearest2d", "_upsample_nearest_exact2d"),
    **_names(partial(_windowed, 2), "upsample_bilinear2d", "_upsample_bilinear2d_aa"),
    **_names(partial(_windowed, 2), "upsample_bicubic2d", "_upsample_bicubic2d_aa"),
    **_names(partial(_windowed, 3), "max_pool3d", "avg_pool3d", "adaptive_avg_pool3d"),
    **_names(partial(_windowed, 3), "adaptive_max_pool3d", "max_pool3d_with_indices"),
    **_names(partial(_windowed, 3), "upsample_nearest3d", "_upsample_nearest_exact3d"),
    **_names(partial(_windowed, 3), "upsample_trilinear3d"),
    **_names(partial(_unpooled, 2), "max_unpool2d"),
    **_names(partial(_unpooled, 3), "max_unpool3d"),
    **_names(_sampled, "grid_sampler"),
    **_names(pointwise, "rsub", "where", "masked_fill", "masked_fill_", "copy_", "expand_as"),
    **_names(layer_rules.prelu, "prelu"),
    **_names(shape_rules.cat, "cat", "concat"),
    **_names(shape_rules.stack, "stack"),
    **_names(shape_rules.reshape, "flatten", "view", "reshape", "_unsafe_view", "unsqueeze"),
    **_names(shape_rules.reshape, "squeeze", "unflatten"),
    **_names(shape_rules.reshape_like, "reshape_as", "view_as"),
    **_names(shape_rules.expand, "expand"),
    **_names(shape_rules.repeat, "repeat", "tile"),
    **_names(shape_rules.repeat_interleave, "repeat_interleave"),
    **_names(shape_rules.permute, "permute"),
    **_names(shape_rules.movedim, "movedim", "moveaxis"),
    **_names(shape_rules.transpose, "transpose", "swapaxes", "swapdims", "t", "mT"),
    **_names(_reversed, "numpy_T"),
    **_names(shape_rules.flip, "flip"),
    **_names(shape_rules.roll, "roll"),
    **_names(shape_rules.spread, "im2col", "pixel_unshuffle"),
    **_names(shape_rules.gather, "col2im", "pixel_shuffle"),
    **_names(shape_rules.shuffle, "channel_shuffle"),
    **_names(shape_rules.halve, "glu"),
    **_names(shape_rules.unlabelled, "new_zeros", "new_ones", "new_full", "new_empty"),
    **_names(shape_rules.slice_, "slice"),
    **_names(shape_rules.narrow, "narrow"),
    **_names(shape_rules.parts, "chunk", "split"),
    **_names(shape_rules.tensor_split, "tensor_split"),
    **_names(shape_rules.split_with_sizes, "split_with_sizes"),
    **_names(shape_rules.select, "select"),
    **_names(shape_rules.unbind, "unbind"),
    **_names(shape_rules.index, "index"),
    **_names(shape_rules.unfold, "unfold"),
    **_names(shape_rules.pad, "pad", "constant_pad_nd"),
    **_names(_reduce, "mean", "sum", "amax", "amin", "var", "std", "logsumexp", "prod"),
    **_names(_extreme, "max", "min"),
    **_names(_position, "argmax", "argmin"),
    **_names(_ordered, "cumsum", "cumprod", "logcumsumexp", "sort", "argsort"),
    **_names(_similarity, "cosine_similarity"),
    **_names(_norm, "linalg_vector_norm", "norm"),
    **_names(_softmax, "softmax", "log_softmax"),
    **_names(layer_rules.embedding, "embedding"),
    **_names(layer_rules.addmm, "addmm"),
    **_names(layer_rules.matmul, "matmul", "mm"),
    **_names(layer_rules.product, "bmm"),
    **_names(layer_rules.einsum, "einsum"),
    **_names(layer_rules.attention, "scaled_dot_product_attention"),
}
"""ATen operator name (without overload) -> rule."""

CHANNEL_WISE = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
    | {"batch_norm", "layer_norm", "rms_norm", "group_norm"}
    | {"mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm", "norm"}
    | {"logsumexp", "prod"}
)
"""Operators that may reduce or convolve over channels: their result depends on how many there are.
Surgery restricts them to the kept channels, and so does the masked network that the result is
compared with (`zoo.tracing.contract`)."""
