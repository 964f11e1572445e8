"""Profiles that a search starts from: those of a policy, or of a reference, at every factor."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from zoo.errors import FactorError, ZooError
from zoo.planning.best import BEST, best_policies
from zoo.planning.learned import LEARNED
from zoo.planning.policies import POLICIES
from zoo.planning.rankings import RANKINGS
from zoo.planning.request import request
from zoo.planning.solver import scale_curve, solve
from zoo.registry.store import list_profiles
from zoo.search.evidence import policy_widths
from zoo.search.tasks import Task
from zoo.spec.cost import CostModel
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import Profile

__all__ = ["Start", "check_start", "start_at"]


class Start(NamedTuple):
    """What a search starts from at one factor.

    Attributes:
        name: of a policy, or the reference of a profile; never `best`.
        ratios: keep ratios, one per channel group, in (0, 1].
    """

    name: str
    ratios: tuple[float, ...]


def check_start(
    reference: str, arch: str, groups: ChannelGroups, cf: float, metric: str
) -> tuple[str, Profile | None]:
    """The name that `reference` stands for, and its profile; None where it is a policy.

    `best` is the best policy of all architectures: what is known of this one comes from the test
    images of its exams, and no search may see those.

    Args:
        reference: the name of a policy, or of a profile as `zoo.load` takes it.
        arch, groups: the architecture of the search.
        cf, metric: the factor asked for.

    Raises:
        ZooError: for a name that means nothing, or a profile of other channel groups; the message
            names the choices.
    """
    if reference == BEST:
        reference = best_policies(metric, cf, data=True)[0]
    try:
        asked = request(reference, arch, cf=cf, metric=metric, refit=True, data=True)
    except FactorError as error:
        raise ZooError(
            f"A search cannot start from {reference!r}: {error} {_choices(arch)}"
        ) from None
    profile = asked.profile
    if profile is not None and set(profile.kept) != set(groups.names):
        raise ZooError(
            f"A search of {arch} cannot start from {reference!r}: its channel groups are not those "
            f"of {arch}. {_choices(arch)}"
        )
    return asked.name, profile


def start_at(
    reference: str, arch: str, tasks: Sequence[Task], cost: CostModel, cf: float, metric: str
) -> Start:
    """What a search at `cf` starts from.

    The keep ratios of a profile are scaled to the factor. Policies that rank channels see the
    training images of every task, and the keep ratios are the means over the tasks.

    Raises:
        ZooError: as `check_start`, and for a policy that does not reach the factor.
    """
    groups = tasks[0].groups
    name, profile = check_start(reference, arch, groups, cf, metric)
    if profile is not None:
        ratios = [profile.keep_ratios[group] for group in groups.names]
        return Start(name, solve(cost, scale_curve(ratios), cf, metric).keep_ratios)
    found = []
    for task in tasks:
        widths = policy_widths([name], task, cost, cf, metric)
        if name not in widths:
            raise ZooError(
                f"A search cannot start from {name!r}: it gives {task.name} no profile at {cf:g}x "
                f"{metric}. {_choices(arch)}"
            )
        found.append([w / size for w, size in zip(widths[name], groups.sizes, strict=True)])
    return Start(name, tuple(map(fmean, zip(*found, strict=True))))


def _choices(arch: str) -> str:
    own = [entry.reference for entry in list_profiles(arch=arch)]
    known = [*POLICIES, *RANKINGS, LEARNED, f"{LEARNED}:<folder>", *own, "file:<path>"]
    return f"Known: {', '.join(known)}."
