"""`zoo list` and `zoo show`: the profiles that exist."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

import zoo
from zoo.commands.shared import printable
from zoo.errors import ZooError
from zoo.registry.hub import HubReference, download, files_of
from zoo.spec.profile import Metric

LIBRARIES = ("torchvision", "timm")
"""Prefixes of architectures; any other is a source of profiles."""

__all__ = ["ListCommand", "ShowCommand", "list_profiles", "show"]


@dataclass(frozen=True, kw_only=True)
class ListCommand:
    """The profiles that exist, and the architectures that have none."""

    arch: str | None = None
    """only profiles of this architecture"""
    metric: Metric | None = None
    """only profiles of this metric"""
    source: str | None = None
    """where to look: bundled, published, or hf:[datasets/]ORG/REPO[@REVISION]; by default the first
    two"""
    hub: bool = False
    """list the repositories of the Hugging Face Hub that the zoo can read instead"""


def list_profiles(command: ListCommand) -> None:
    from zoo.commands.rendering import print_policies, print_profiles, print_weights
    from zoo.registry.store import list_architectures
    from zoo.registry.weights import list_weights

    if command.hub:
        _list_hub(command.arch)
        return
    sources = ("bundled", "published") if command.source is None else (command.source,)
    entries = [
        entry
        for source in sources
        for entry in zoo.list_profiles(arch=command.arch, metric=command.metric, source=source)
    ]
    print_profiles(entries, command.arch)
    if command.arch is None and command.source in (None, "bundled"):
        listed = {entry.architecture for entry in zoo.list_profiles(metric=command.metric)}
        missing = [name for name in list_architectures() if name not in listed]
        print_policies(missing, command.metric)
    if command.source in (None, "bundled"):
        print_weights(list_weights(command.arch))


def _list_hub(arch: str | None) -> None:
    from zoo.commands.rendering import print_repositories
    from zoo.publishing.model_card import TAG, spelled_tag
    from zoo.registry.hub_commits import repositories_with

    found = repositories_with(TAG)
    if arch is not None:
        found = [each for each in found if spelled_tag(arch) in each.tags]
    print_repositories(found)


@dataclass(frozen=True, kw_only=True)
class ShowCommand:
    """Show a profile, a bar per channel group with its cost and evidence, or a pruned network."""

    profile: Annotated[Positional[str], arg(metavar="REFERENCE")]
    """of a profile (bundled:resnet20-16/params-cf4, published:resrep, file:PATH), an architecture
    with --cf, a pruned network (its folder or hf:ORG/REPO), or learned: the policy of that name"""
    cf: float | None = None
    """compression factor, with an architecture"""
    metric: Metric = "params"
    """cost that the factor refers to, with an architecture; a latency profile is for one device"""


def show(command: ShowCommand) -> None:
    from zoo.commands.rendering import print_profile
    from zoo.registry.store import find_profile, is_registry, untagged

    what, arch = command.profile, None
    source, colon, _ = what.partition(":")
    if source == "learned":
        _show_learned(what)
        return
    if is_registry(what) or (command.cf is None and Path(what).is_dir()):
        _show_repository(what)
        return
    if colon and source not in LIBRARIES:
        reference, profile = what, zoo.get_profile(what)
    elif command.cf is not None:
        arch = what
        reference, profile = find_profile(arch, command.cf, command.metric)
        if untagged(arch) != profile.architecture:
            from zoo.planning.borrowed import borrowed  # imports torch

            profile = borrowed(profile, arch) or profile
    else:
        own = [f"{entry.cf:g}x {entry.metric}" for entry in zoo.list_profiles(arch=what)]
        if not own:
            raise ZooError(f"{what} has no searched profile; a policy prunes it by any factor.")
        raise ZooError(f"Which profile of {what}? Add --cf and --metric: it has {', '.join(own)}.")
    print_profile(reference, profile, arch)


def _show_learned(name: str) -> None:
    """How a learned policy was trained."""
    from zoo.planning.learned import learned_policy

    own = learned_policy(name).training
    known = ", ".join(f"{ranking} by {metric}" for metric, ranking in own.known.items())
    factors = ", ".join(f"{factor:g}x" for factor in own.factors)
    print(
        printable(
            f"{name}: a policy network, trained by PPO over several architectures; it prunes any "
            f"network by any factor\n\n"
            f"trained on    {', '.join(own.architectures)}; {', '.join(own.data)}\n"
            f"for           {factors} of {', '.join(own.metrics)}\n"
            f"corrects      {known}; equal without images\n"
            f"episodes      {own.episodes}, each measured by {own.fidelity}\n\n"
            f"Found by: {own.command}"
        )
    )


def _show_repository(what: str) -> None:
    """How a pruned network was made, or which profiles a registry has."""
    from zoo.commands.rendering import print_profiles
    from zoo.registry.store import INDEX
    from zoo.storage.checkpoints import RECORD

    if not what.startswith("hf:"):
        if not (Path(what) / RECORD).is_file():
            raise ZooError(f"{what} holds no pruned network: {RECORD} is missing.")
        _print_record(Path(what) / RECORD)
        return
    names, reference = files_of(HubReference.parse(what))
    if RECORD in names:
        print(printable(str(reference)))
        _print_record(download(reference.file(RECORD))[0])
    elif INDEX in names:
        print_profiles(zoo.list_profiles(source=str(reference)), None)
    else:
        raise ZooError(f"{reference} holds no pruned network and no registry of profiles.")


def _print_record(path: Path) -> None:
    from zoo.spec.plans import PruningRecord
    from zoo.storage.readme import cost_table, notes

    record = PruningRecord.read(path)
    print(printable(f"{record.architecture}\n\n{cost_table(record)}\n\n{notes(record)}"))
