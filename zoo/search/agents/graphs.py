"""A network's computational graph from its stored channel groups, at any widths. Nothing is traced.

A node is the feature map of one channel group, the input image, or the classifier's output. An edge
is an operation: a convolution or dense layer, from the map that it reads to the map that it writes.
The maps of one resolution form a *stage*. The coarser graph has the stages as nodes and the same
operations as edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.spec.cost import Extent, cost_model, extents
from zoo.spec.groups import ChannelGroups

__all__ = ["NODE_FEATURES", "OPERATION_FEATURES", "Architecture", "Graphs"]

NODE_FEATURES = 5
"""Keep ratio; relative dense width on a log scale; whether it is the image; whether it is the
output; log of the compression still missing."""

OPERATION_FEATURES = 5
"""Kept shares of its inputs and of its outputs; its present parameters and MACs, as shares of the
whole dense network's; its kernel's area on a log scale."""


@dataclass(frozen=True)
class Graphs:
    """The graphs of B states of one network: same edges, different features."""

    nodes: Tensor
    """(B, nodes, NODE_FEATURES)"""
    operations: Tensor
    """(B, operations, OPERATION_FEATURES)"""
    source: Tensor
    """(operations,): the node that each operation reads"""
    target: Tensor
    """(operations,): the node that each operation writes"""
    stage: Tensor
    """(nodes,): the stage of each node"""


@dataclass(frozen=True)
class _Operation:
    """One layer as an edge: its two nodes, and what its cost depends on."""

    source: int
    target: int
    inputs: Extent
    outputs: Extent
    area: int
    positions: int


class Architecture:
    """Makes the graphs of one architecture's networks from its channel groups."""

    def __init__(self, groups: ChannelGroups) -> None:
        self._sizes = groups.sizes
        self._dense = cost_model(groups).dense
        self._operations = _operations(groups)
        ends = [(operation.source, operation.target) for operation in self._operations]
        self._source, self._target = torch.tensor(ends).T
        written = {operation.target: operation.positions for operation in self._operations}
        resolutions = [written.get(node, 0) for node in range(len(groups.sizes) + 2)]
        self._stage = torch.tensor([sorted(set(resolutions)).index(r) for r in resolutions])

    def __call__(self, keep_ratios: NDArray, to_come: NDArray) -> Graphs:
        """The graphs of B networks with these keep ratios.

        Args:
            keep_ratios: of shape (B, groups).
            to_come: of shape (B,): log(asked factor / factor of the network).
        """
        nodes = [
            self._node_features(row, left) for row, left in zip(keep_ratios, to_come, strict=True)
        ]
        operations = [self._operation_features(row) for row in keep_ratios]
        return Graphs(
            torch.tensor(nodes, dtype=torch.float32),
            torch.tensor(operations, dtype=torch.float32),
            self._source,
            self._target,
            self._stage,
        )

    def _node_features(self, keep_ratios: NDArray, to_come: float) -> list[list[float]]:
        largest = math.log(max(self._sizes) + 1)
        rows = [
            [ratio, math.log(size) / largest, 0.0, 0.0, to_come]
            for ratio, size in zip(keep_ratios, self._sizes, strict=True)
        ]
        return [*rows, [1.0, 0.0, 1.0, 0.0, to_come], [1.0, 0.0, 0.0, 1.0, to_come]]

    def _operation_features(self, keep_ratios: NDArray) -> list[list[float]]:
        widths = list(keep_ratios * self._sizes)
        rows = []
        for layer in self._operations:
            inputs, outputs = layer.inputs(widths), layer.outputs(widths)
            params = inputs * outputs * layer.area
            rows.append(
                [
                    inputs / layer.inputs(self._sizes),
                    outputs / layer.outputs(self._sizes),
                    params / self._dense.params,
                    params * layer.positions / self._dense.macs,
                    math.log10(layer.area),
                ]
            )
        return rows


def _operations(groups: ChannelGroups) -> list[_Operation]:
    """The edges of the graph: one per layer, map that it reads, and map that it writes."""
    image, classes = len(groups.sizes), len(groups.sizes) + 1
    lengths, found = extents(groups), []
    for name, positions in groups.positions.items():
        outputs, inputs, *kernel = lengths[name]
        area = math.prod(extent.fixed for extent in kernel)
        targets = [group for group, _ in outputs.per] or [classes]
        depthwise = not inputs.per and inputs.fixed == 1
        sources = [group for group, _ in inputs.per] or (targets if depthwise else [image])
        found += [
            _Operation(
                source, target, _part(inputs, source), _part(outputs, target), area, positions
            )
            for source in sources
            for target in targets
        ]
    return found


def _part(extent: Extent, group: int) -> Extent:
    """The part of a dimension that belongs to one group; for image and classes, the fixed part."""
    per = tuple((own, count) for own, count in extent.per if own == group)
    return Extent(0, per) if per else Extent(extent.fixed)
