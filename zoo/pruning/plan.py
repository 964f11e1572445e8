"""Plans: which channels of every group are kept. The plan decides, surgery obeys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zoo.cost import Cost, cost_model
from zoo.errors import GraphError, unknown
from zoo.groups import ChannelGroups

__all__ = ["Plan", "PruningRecord", "Source", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The kept indices of every channel group, with how they were chosen.

    Attributes:
        profile: the reference of the profile, or the name of the policy.
        metric, asked, got: the compression factor asked for, and met for this very network.
        keep_ratios: group name -> fraction kept.
        kept: group name -> indices kept, ascending.
        criterion, seed: what chose the channels.
        dense, pruned: costs at `num_classes` and `image_size`.
        unprunable: module name -> why its channels stay whole.
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

    @property
    def widths(self) -> dict[str, int]:
        """Channels kept, by group name."""
        return {name: len(indices) for name, indices in self.kept.items()}


@dataclass(frozen=True)
class Source:
    """The dense weights a pruned network came from; `sha256` is of the file, where there is one."""

    reference: str
    sha256: str | None = None


@dataclass(frozen=True)
class PruningRecord:
    """What a pruned module knows about itself, as its attribute `pruning`, and `pruning.json`.

    Attributes:
        architecture: a registered name, or "" for a network that has none.
        init: where its weights came from: `pretrained` or `random`.
        versions: of the packages that made it.
    """

    architecture: str
    num_classes: int
    image_size: int
    plan: Plan
    init: str
    source: Source
    versions: dict[str, str]


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
) -> Plan:
    """The plan that keeps, in each group, the `widths[group]` channels of highest score.

    Args:
        groups: of the network that will be cut.
        widths: group name -> channels to keep.
        scores: per group in order, one score per channel; ties keep the lower index.
        profile, metric, asked, criterion, seed: recorded as they are.

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
        order = sorted(range(group.size), key=lambda unit: (-score[unit], unit))
        kept[group.name] = tuple(sorted(order[:width]))
        ratios[group.name] = width / group.size
    model = cost_model(groups)
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
    )
