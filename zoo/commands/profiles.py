"""`zoo list` and `zoo show`: the profiles that exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

import zoo
from zoo.commands.shared import Metric
from zoo.errors import ZooError

__all__ = ["ListCommand", "ShowCommand", "list_profiles", "show"]


@dataclass(frozen=True, kw_only=True)
class ListCommand:
    """The profiles that exist, and the architectures that have none."""

    arch: str | None = None
    """only profiles of this architecture"""
    metric: Metric | None = None
    """only profiles of this metric"""
    source: str | None = None
    """where to look: bundled, published, or hf:ORG/REPO[@REVISION]; by default the first two"""


def list_profiles(command: ListCommand) -> None:
    from zoo.commands.rendering import print_policies, print_profiles, print_weights
    from zoo.registry.store import list_architectures
    from zoo.registry.weights import list_weights

    sources = ("bundled", "published") if command.source is None else (command.source,)
    entries = [
        entry
        for source in sources
        for entry in zoo.list_profiles(arch=command.arch, metric=command.metric, source=source)
    ]
    print_profiles(entries, command.arch)
    if command.arch is None and command.source in (None, "bundled"):
        listed = {entry.architecture for entry in zoo.list_profiles()}
        print_policies([name for name in list_architectures() if name not in listed])
    if command.source in (None, "bundled"):
        print_weights(list_weights(command.arch))


@dataclass(frozen=True, kw_only=True)
class ShowCommand:
    """Show one profile: a bar per channel group, its cost, and its evidence."""

    profile: Annotated[Positional[str], arg(metavar="PROFILE")]
    """a reference (bundled:resnet20-16/params-cf4, published:resrep, file:PATH), or an architecture
    with --cf"""
    cf: float | None = None
    """compression factor, with an architecture"""
    metric: Metric = "params"
    """cost that the factor refers to, with an architecture; a latency profile is for one device"""


def show(command: ShowCommand) -> None:
    from zoo.commands.rendering import print_profile
    from zoo.registry.store import find_profile

    arch = None
    if command.cf is not None:
        arch = command.profile
        reference, profile = find_profile(arch, command.cf, command.metric)
    elif ":" in command.profile:
        reference, profile = command.profile, zoo.get_profile(command.profile)
    else:
        raise ZooError(f"Which factor of {command.profile!r}? Add --cf, or give a reference.")
    print_profile(reference, profile, arch)
