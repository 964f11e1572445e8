"""Plans: which channels of every group are kept. The plan decides, surgery obeys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from zoo.common.documents import decode_document, read_json
from zoo.common.sizes import Size, checked_size, resolution
from zoo.errors import GraphError, unknown
from zoo.spec.cost import Conditions, Cost, LatencyTable, cost_model
from zoo.spec.groups import ChannelGroups, InputShape

__all__ = [
    "Plan",
    "PruningRecord",
    "Source",
    "attribute_values",
    "kept_positions",
    "make_plan",
    "record_of",
]


@dataclass(frozen=True)
class Plan:
    """The kept indices of every channel group, with how they were chosen.

    Attributes:
        profile: the reference of the profile, or the name of the policy.
        metric, asked, got: the compression factor asked for, and the one reached on this network.
        keep_ratios: group name -> fraction kept.
        kept: group name -> indices kept, ascending.
        criterion, seed: what chose the channels.
        dense, pruned: costs at the network's classes and `image_size`; with latency if that is the
            metric, predicted from the table of measured layers.
        unprunable: module name -> why its channels stay whole.
        attributes: `<module>:<attribute>` -> the width that surgery sets it to.
        latency: conditions under which latency was measured; None if it was not.
        inputs: what the network is called with, as in `ChannelGroups`.
    """

    profile: str
    metric: str
    asked: float
    got: float
    keep_ratios: dict[str, float]
    kept: dict[str, tuple[int, ...]]
    criterion: str
    seed: int
    dense: Cost
    pruned: Cost
    image_size: int
    unprunable: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    latency: Conditions | None = None
    inputs: tuple[InputShape, ...] = ()

    @property
    def input_size(self) -> str:
        """Size of one item as text: 32x32, or the shapes of all inputs."""
        return ", ".join(map(str, self.inputs)) or resolution(self.image_size)

    @property
    def widths(self) -> dict[str, int]:
        """Channels kept, by group name."""
        return {name: len(indices) for name, indices in self.kept.items()}


@dataclass(frozen=True)
class Source:
    """The dense weights a pruned network came from.

    Attributes:
        sha256: of the file, where there is one.
        averaged: True for the checkpoint's averaged weights, False for its plain ones; None if it
            has only one kind.
    """

    reference: str
    sha256: str | None = None
    averaged: bool | None = None


@dataclass(frozen=True)
class PruningRecord:
    """How a pruned module was made: its attribute `pruning`, and `pruning.json` on disk.

    Attributes:
        architecture: a registered name, or "" for a network that has none.
        num_classes: 0 for a network whose outputs are not logits.
        init: where its weights came from: `pretrained`, `random` or `rewound`.
        versions: of the packages that made it.
        rewind: the checkpoint that `rewound` weights are from.
        rewritten: whether it is the traced program of the dense network (`zoo.tracing.rewriting`).
        new_classifier: whether the network began with a random classifier, because the source has
            none for these classes.
        in_channels: channels of the images that the architecture is built for.
    """

    architecture: str
    num_classes: int
    image_size: int
    plan: Plan
    init: str
    source: Source
    versions: dict[str, str]
    rewind: Source | None = None
    rewritten: bool = False
    new_classifier: bool = False
    in_channels: int = 3

    @classmethod
    def read(cls, path: Path) -> PruningRecord:
        """The record in the JSON file at `path`.

        Raises:
            DocumentError: for a file that is missing or malformed.
        """
        return decode_document(cls, read_json(path), str(path))

    @property
    def size(self) -> Size:
        """Image size as `zoo.load` takes it: pixels per side, or (height, width)."""
        shapes = [of.shape for of in self.plan.inputs]
        if len(shapes) == 1 and len(shapes[0]) == 4:
            return checked_size("image_size", shapes[0][2:])
        return self.image_size


def record_of(module: object) -> PruningRecord | None:
    """The record of a pruned module; None for anything else."""
    record = getattr(module, "pruning", None)
    return record if isinstance(record, PruningRecord) else None


def make_plan(
    groups: ChannelGroups,
    widths: Mapping[str, int],
    scores: Sequence[Sequence[float]],
    *,
    profile: str,
    metric: str,
    asked: float,
    criterion: str,
    seed: int,
    latency: LatencyTable | None = None,
) -> Plan:
    """The plan that keeps, in each group, the `widths[group]` channels of highest score.

    Args:
        groups: of the network that will be cut.
        widths: group name -> channels to keep.
        scores: per group in order, one score per channel; ties keep the lower index.
        profile, metric, asked, criterion, seed: recorded as they are.
        latency: the network's measured layers, needed if latency is the metric.

    Raises:
        GraphError: if the widths do not name exactly the groups, or exceed them.
    """
    for name in widths:
        if name not in groups.names:
            raise unknown("channel group", name, groups.names, GraphError)
    kept, ratios = {}, {}
    for group, score in zip(groups.groups, scores, strict=True):
        if group.name not in widths:
            raise GraphError(f"The profile has no keep ratio for the group {group.name!r}.")
        width = widths[group.name]
        if not 1 <= width <= group.size:
            raise GraphError(f"{group.name!r} cannot keep {width} of {group.size} channels.")
        order = np.argsort(-np.asarray(score, dtype=float), kind="stable")
        kept[group.name] = tuple(np.sort(order[:width]).tolist())
        ratios[group.name] = width / group.size
    model = cost_model(groups, latency)
    pruned = [len(kept[name]) for name in groups.names]
    return Plan(
        profile=profile,
        metric=metric,
        asked=asked,
        got=model.factor(pruned, metric),
        keep_ratios=ratios,
        kept=kept,
        criterion=criterion,
        seed=seed,
        dense=model.dense,
        pruned=model(pruned),
        image_size=groups.image_size,
        unprunable=groups.unprunable,
        attributes=attribute_values(groups, kept),
        latency=None if latency is None else latency.conditions,
        inputs=groups.inputs,
    )


def kept_positions(
    groups: ChannelGroups, kept: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, np.ndarray]]:
    """Tensor or attribute -> dimension -> positions that remain if `kept` units do, ascending.

    Dimensions that lose nothing are left out.
    """
    stays: dict[tuple[str, int], np.ndarray] = {}
    for group in groups.groups:
        removed = np.ones(group.size, dtype=bool)
        removed[list(kept[group.name])] = False
        gone = np.flatnonzero(removed)
        for slot in group.slots if len(gone) else ():
            key = slot.tensor, slot.dim
            if key not in stays:
                stays[key] = np.ones(groups.length(*key), dtype=bool)
            first = np.array(slot.at)[gone] if slot.at else slot.start + slot.stride * gone
            for offset in range(slot.block):
                stays[key][first + offset] = False
    positions: dict[str, dict[int, np.ndarray]] = {}
    for (tensor, dim), row in stays.items():
        positions.setdefault(tensor, {})[dim] = np.flatnonzero(row)
    return positions


def attribute_values(groups: ChannelGroups, kept: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Attribute of `groups` -> its value when only the `kept` units remain."""
    remaining = kept_positions(groups, kept) if groups.attributes else {}
    return {
        name: len(remaining[name][0]) if name in remaining else value
        for name, value in groups.attributes.items()
    }
