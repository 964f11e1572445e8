"""What a search found as a profile that says where it comes from."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zoo.groups import ChannelGroups
from zoo.models import architecture
from zoo.profile import Profile, Provenance, Reference
from zoo.search.tasks import Task

if TYPE_CHECKING:
    from zoo.search.campaign import SearchConfig

__all__ = ["Found", "profile_of"]


@dataclass(frozen=True)
class Found:
    """The winner of a search at one factor.

    Attributes:
        cf, got: the factor asked for, and that of `widths`.
        widths: channels kept, per group in order.
        episodes: played at this factor.
        evaluations: of the whole search so far, replayed ones included; `seconds` likewise.
        tasks: that episodes were played on.
        judges: that finalists were compared on.
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
    fidelity: str


def profile_of(config: SearchConfig, groups: ChannelGroups, found: Found) -> Profile:
    """The profile of `found`, at the architecture's reference, with its provenance."""
    known, env = architecture(config.arch), config.env
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
            command=_command(config),
            agent=f"{config.agent}, {env.projection} projection, {env.reward} reward",
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


def _named(task: Task) -> str:
    return (
        f"{task.name} (sha256 {task.network}) on {task.val.name}, validation split "
        f"{task.split_digest[:12]}"
    )


def _command(config: SearchConfig) -> str:
    """The command line of this configuration; absolute paths are shortened to their last part."""
    return shlex.join(["zoo", "search", *_flags(config)])


def _flags(settings: Any) -> Iterator[str]:
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        flag = item.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _flags(value)
        elif item.name == "resume" or value in (None, (), False):
            continue
        elif value is True:
            yield f"--{flag}"
        else:
            yield f"--{flag}"
            for word in value if isinstance(value, tuple) else (value,):
                yield re.sub(r"(?:^|(?<=[@:]))/\S*/", "", str(word))


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, one thread per process"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("prunezoo", "torch", "numpy", "gymnasium", "stable-baselines3"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
