"""Profiles that an architecture borrows from a relative with other channel groups or widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from zoo.models import architecture
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import Profile
from zoo.tracing.known_groups import reference_groups

__all__ = ["borrowed", "carried"]


def borrowed(profile: Profile, arch: str) -> Profile | None:
    """`profile` for the channel groups of `arch`; None unless that borrows it from a relative.

    It is of no exact factor any more: its keep ratios are to be scaled to one.
    """
    known = architecture(arch)
    if not known.rescaled or profile.architecture != known.profiles_from:
        return None
    groups = reference_groups(arch)
    ratios = carried(profile.kept, reference_groups(profile.architecture), groups)
    sizes = dict(zip(groups.names, groups.sizes, strict=True))
    kept = {name: max(1, round(ratio * sizes[name])) for name, ratio in ratios.items()}
    return replace(profile, keep_ratios=ratios, kept=kept)


def carried(
    kept: Mapping[str, int], lender: ChannelGroups, groups: ChannelGroups
) -> dict[str, float]:
    """The keep ratio of each of `groups`, from the channels kept of the lender's groups.

    It is the share that the lender's module of the same name keeps of its output channels. They can
    belong to several groups, as beside the zero channels of a padded shortcut.

    Args:
        kept: the lender's group -> number of channels kept.
        lender: the channel groups of a network with the same module names.
        groups: those of the network that borrows.
    """
    outputs: dict[str, list[tuple[int, int]]] = {}  # weight -> (kept, size) of each group in it
    for group in lender.groups:
        for slot in group.filter_slots:
            outputs.setdefault(slot.tensor, []).append((kept[group.name], group.size))
    ratios = {}
    for name in groups.names:
        counts = outputs[f"{name.partition('[')[0]}.weight"]
        ratios[name] = sum(left for left, _ in counts) / sum(size for _, size in counts)
    return ratios
