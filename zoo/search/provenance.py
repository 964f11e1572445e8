"""The result of a search as a profile with its provenance."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.errors import DocumentError
from zoo.models import architecture
from zoo.search.settings import SPELLED, SearchConfig
from zoo.search.tasks import Task
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import Profile, Provenance, Reference

PACKAGES = (
    "prunezoo",
    "torch",
    "numpy",
    "gymnasium",
    "stable-baselines3",
    "cmaes",
    "pymoo",
)

__all__ = ["Found", "as_first_found", "command_of", "profile_of", "shortened"]


@dataclass(frozen=True)
class Found:
    """The winner of a search at one factor.

    Attributes:
        cf, got: the factor asked for, and that of `widths`.
        widths: channels kept, per group in order.
        episodes: played at this factor.
        evaluations: of these episodes and the choice, replayed ones included.
        seconds: wall time of both; the time of replayed evaluations is divided by the workers.
        tasks: tasks that episodes were played on.
        judges: tasks that finalists were compared on.
        start: what the search started from; None if from nothing.
        fidelity: of the episodes and of the choice.
    """

    cf: float
    got: float
    widths: tuple[int, ...]
    episodes: int
    evaluations: int
    seconds: float
    tasks: tuple[Task, ...]
    judges: tuple[Task, ...]
    start: str | None
    fidelity: str


def profile_of(config: SearchConfig, groups: ChannelGroups, found: Found) -> Profile:
    """The profile of `found`, at the architecture's reference, with its provenance."""
    known, env = architecture(config.arch), config.env
    start = "" if found.start is None else f", from {shortened(found.start)}"
    judged = () if found.judges == found.tasks else found.judges
    return Profile(
        architecture=config.arch,
        metric=env.metric,
        cf=found.cf,
        got=found.got,
        reference=Reference(known.num_classes, known.image_size),
        keep_ratios={
            group.name: width / group.size
            for group, width in zip(groups.groups, found.widths, strict=True)
        },
        kept=dict(zip(groups.names, found.widths, strict=True)),
        provenance=Provenance(
            command=command_of(config, found.episodes),
            agent=f"{config.agent}{start}, {env.projection} projection, {env.reward} reward",
            seed=config.seed,
            episodes=found.episodes,
            evaluations=found.evaluations,
            seconds=round(found.seconds, 1),
            tasks=(
                *(_named(task) for task in found.tasks),
                *(f"{_named(task)}, for the choice alone" for task in judged),
            ),
            split_digest=found.tasks[0].split_digest,
            fidelity=found.fidelity,
            machine=_machine(),
            date=datetime.date.today().isoformat(),
            versions=_versions(),
        ),
    )


def as_first_found(profile: Profile, path: Path) -> Profile:
    """`profile`, with the provenance in the file at `path` if that has the same command and widths.

    So a search that is only replayed does not change machine, date and versions.
    """
    try:
        before = Profile.read(path)
    except DocumentError:
        return profile
    own, first = profile.provenance, before.provenance
    if own is None or first is None or (own.command, profile.kept) != (first.command, before.kept):
        return profile
    return dataclasses.replace(profile, provenance=first)


def _named(task: Task) -> str:
    return (
        f"{task.name} (sha256 {task.network}) on {task.val.name}, validation split "
        f"{task.split_digest[:12]}"
    )


def command_of(config: SearchConfig, episodes: int) -> str:
    """The command line of this configuration, with the number of episodes played, not its budget.

    Absolute paths are shortened to their last part.
    """
    played = dataclasses.replace(config, episodes=max(1, episodes), budget=None, resume=False)
    return shlex.join(["zoo", "search", *_flags(played)])


def _flags(settings: Any) -> Iterator[str]:
    """The flags that differ from the defaults."""
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        flag = f"--{SPELLED.get(item.name, item.name).replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            yield from _flags(value)
        elif value is True:
            yield flag
        elif value != item.default:
            yield flag
            for word in value if isinstance(value, tuple) else (value,):
                yield shortened(str(word))


def shortened(reference: str) -> str:
    """A word of a command line without absolute folders, which are those of one machine.

    `arch=/some/folder/file@imagefolder:/other/data[:50]` is `arch=file@imagefolder:data[:50]`.
    """
    if "://" in reference:
        return reference
    return re.sub(r"(^|[@:=])/[^@:]*/", r"\1", reference)


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, one thread per process"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
