"""Rules of operators with weights or products: convolutions, linear layers, norms, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from zoo.errors import GraphError
from zoo.tracing import shape_rules
from zoo.tracing.labels import Labels, Trace, Value, is_channels
from zoo.tracing.macs import macs_of_call

__all__ = [
    "addmm",
    "attention",
    "batch_norm",
    "convolution",
    "einsum",
    "embedding",
    "group_norm",
    "layer_norm",
    "linear",
    "matmul",
    "prelu",
    "product",
    "transposed_convolution",
]

Shape = tuple[int, ...]


def convolution(
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
        trace.produce(outputs)
    if bias is not None:
        trace.tie(outputs, bias.labels[0])
    rows = _image_rows(trace, shape, x)
    trace.count(weight, shape[0] * math.prod(shape[2:]))
    return Value(shape, (None, outputs, *rows))


def transposed_convolution(
    trace: Trace,
    shape: Shape,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: object = 1,
    padding: object = 0,
    output_padding: object = 0,
    groups: int = 1,
    dilation: object = 1,
) -> Value:
    """Depthwise ones pass labels on; others produce new ones; grouped ones are fixed."""
    del stride, padding, output_padding, dilation
    fan_in, outputs = weight.labels[0], weight.labels[1]
    if weight.shape[1] == 1 and groups > 1:
        outputs = trace.tie(x.labels[1], fan_in)
    else:
        if groups > 1:
            trace.fix(x.labels[1], "is the input of a grouped transposed convolution")
            trace.fix(outputs, "is produced by a grouped transposed convolution")
        trace.tie(x.labels[1], fan_in)
        if outputs is None:
            raise GraphError("a transposed convolution whose weight has no labels")
        trace.produce(outputs)
        outputs = np.tile(outputs, groups)
    if bias is not None:
        trace.tie(outputs, bias.labels[0])
    rows = _image_rows(trace, shape, x)
    trace.count(weight, x.shape[0] * math.prod(x.shape[2:]))
    return Value(shape, (None, outputs, *rows))


def _image_rows(trace: Trace, shape: Shape, x: Value) -> list[Labels | None]:
    """The rows convolved over; channels among them (efficient channel attention) keep labels."""
    rows: list[Labels | None] = []
    for old, new, row in zip(x.shape[2:], shape[2:], x.labels[2:], strict=True):
        if is_channels(row) and old != new:
            trace.fix(row, "is convolved over, which changes its length")
            row = None
        rows.append(row)
    return rows


def linear(trace: Trace, shape: Shape, x: Value, weight: Value, bias: Value | None = None) -> Value:
    outputs, fan_in = weight.labels
    if outputs is None or fan_in is None:
        raise GraphError("a linear layer whose weight has no labels")
    if x.labels[-1] is None:
        trace.fix(fan_in, "")
    else:
        trace.tie(x.labels[-1], fan_in)
    trace.produce(outputs)
    if bias is not None:
        trace.tie(outputs, bias.labels[0])
    trace.count(weight, math.prod(x.shape[:-1]))
    return Value(shape, (*x.labels[:-1], outputs))


def addmm(trace: Trace, shape: Shape, bias: Value, x: Value, weight: Value) -> Value:
    return linear(trace, shape, x, _transposed(trace, weight), bias)


def _transposed(trace: Trace, matrix: Value) -> Value:
    return shape_rules.transpose(trace, matrix.shape[::-1], matrix, 0, 1)


def batch_norm(trace: Trace, shape: Shape, x: Value, *tensors: Any, **options: Any) -> Value:
    for tensor in (*tensors, *options.values()):
        if isinstance(tensor, Value):
            trace.tie(x.labels[1], tensor.labels[0])
    return Value(shape, x.labels)


def prelu(trace: Trace, shape: Shape, x: Value, weight: Value) -> Value:
    return batch_norm(trace, shape, x, *([weight] if weight.shape[0] > 1 else []))


def layer_norm(
    trace: Trace, shape: Shape, x: Value, normalized: list[int], *tensors: Any, **options: Any
) -> Value:
    for tensor in (*tensors, *options.values()):
        if isinstance(tensor, Value):
            for d in range(-len(normalized), 0):
                trace.tie(x.labels[d], tensor.labels[d])
    return Value(shape, x.labels)


def group_norm(
    trace: Trace, shape: Shape, x: Value, groups: int, *tensors: Any, **options: Any
) -> Value:
    row = x.labels[1]
    if groups > 1 and is_channels(row):
        trace.tie(row, np.tile(row[: len(row) // groups], groups))
    return batch_norm(trace, shape, x, *tensors, **options)


def embedding(trace: Trace, shape: Shape, table: Value, *rest: Any, **options: Any) -> Value:
    del rest, options
    trace.fix(table.labels[0], "is indexed by a position")
    return Value(shape, (*[None] * (len(shape) - 1), table.labels[1]))


def product(trace: Trace, shape: Shape, *operands: Any, **options: Any) -> Value:
    """Products of activations (attention): all their channels are fixed."""
    values = [v for v in (*operands, *options.values()) if isinstance(v, Value)]
    _fix_products(trace, values)
    trace.add_macs(math.prod(shape) * values[0].shape[-1])
    return Value(shape, (None,) * len(shape))


def _fix_products(trace: Trace, values: Sequence[Value]) -> None:
    for value in values:
        for row in value.labels:
            trace.fix(row, "is multiplied by other activations (attention)")


def matmul(trace: Trace, shape: Shape, x: Value, y: Value) -> Value:
    """A linear layer if the second factor is a stored matrix or its transpose."""
    homes = {trace.home(row) for row in y.labels}
    if len(y.shape) == len(homes) == 2 and len({name for name, _ in homes} - {""}) == 1:
        return linear(trace, shape, x, _transposed(trace, y))
    return product(trace, shape, x, y)


def einsum(
    trace: Trace, shape: Shape, equation: str, factors: Sequence[Value], **options: Any
) -> Value:
    _fix_products(trace, factors)
    like = [torch.empty(factor.shape, device="meta") for factor in factors]
    trace.add_macs(macs_of_call(torch.ops.aten.einsum, equation, like, **options))
    return Value(shape, (None,) * len(shape))


def attention(
    trace: Trace, shape: Shape, query: Value, key: Value, value: Value, *rest: Any, **options: Any
) -> Value:
    scores = math.prod(query.shape[:-1]) * key.shape[-2] * query.shape[-1]
    trace.add_macs(scores)
    return product(
        trace, shape, Value((*query.shape[:-1], key.shape[-2]), query.labels), key, value, *rest,
        **options,
    )  # fmt: skip
