"""The registry's evaluations: those of an architecture, and the nearest to a profile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import gt
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError, integer
from zoo.registry.store import folder_name, get_profile, registry_folder
from zoo.search.ledger import TEST, Row, read
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import Profile
from zoo.tracing.known_groups import reference_groups

__all__ = [
    "EvaluatedProfile",
    "Measurement",
    "evaluated_profiles",
    "ledger_lookup",
    "ledger_path",
    "ledger_paths",
]

LEDGERS = "ledger"
"""The folder of a registry that holds the evaluations, a file for each architecture."""

Ratios = Profile | str | Mapping[str, float] | Sequence[float]


@dataclass(frozen=True)
class Measurement:
    """On what accuracies were measured, and how; those of one measurement can be compared.

    Attributes:
        network: sha256 of the base network's checkpoint.
        split: digest of its training images and of those that were measured on.
        classes, image_size: of the data, in pixels per side.
        fidelity: what was done before the accuracy was taken, such as a fine-tune.
    """

    network: str
    split: str
    classes: int
    image_size: int
    fidelity: str

    @property
    def on_test(self) -> bool:
        """Whether accuracies are those of test images, which no search may choose by."""
        return self.split.startswith(TEST)


@dataclass(frozen=True)
class EvaluatedProfile:
    """A profile that was measured.

    Attributes:
        kept: channels kept, per channel group.
        keep_ratios: their shares, in (0, 1].
        accuracy: in [0, 1], the mean over the draws; on validation images, unless
            `measurement.on_test`.
        draws: draws of random channels that were measured.
        measurement: on what, and how.
        distance: root mean square difference to the keep ratios that were asked for.
    """

    kept: dict[str, int]
    keep_ratios: dict[str, float]
    accuracy: float
    draws: int
    measurement: Measurement
    distance: float = 0.0


def ledger_lookup(
    architecture: str,
    profile: Ratios,
    *,
    nearest: int = 5,
    network: str = "",
    fidelity: str = "",
    ledger: str | Path | None = None,
) -> list[EvaluatedProfile]:
    """The evaluated profiles of an architecture that are nearest to a profile, nearest first.

    A profile that was measured on several networks or in several ways comes once for each.
    Evaluations with channels by another criterion than `random` are left out.

    Args:
        architecture: a name of the registry.
        profile: a `Profile`, the reference of one, or keep ratios: per channel group by name, or
            in the order of the groups.
        nearest: how many distinct profiles.
        network: the first digits of a base network's sha256; by default any.
        fidelity: how its name begins, such as `recalibration` or `fine-tune`; by default any.
        ledger: a file of evaluations; by default that of the registry.

    Raises:
        ZooError: for an unknown architecture, one without such evaluations, or keep ratios that
            are not one in (0, 1] for each channel group.
    """
    integer("nearest", nearest, 1)
    found = evaluated_profiles(architecture, network=network, fidelity=fidelity, ledger=ledger)
    wanted = _ratios(profile, reference_groups(architecture))
    ratios = np.array([tuple(each.keep_ratios.values()) for each in found])
    distances = np.sqrt(((ratios - wanted) ** 2).mean(axis=1))
    order = np.argsort(distances, kind="stable").tolist()
    distinct = dict.fromkeys(tuple(found[at].kept.values()) for at in order)
    chosen = set(islice(distinct, nearest))
    return [
        replace(found[at], distance=float(distances[at]))
        for at in order
        if tuple(found[at].kept.values()) in chosen
    ]


def evaluated_profiles(
    architecture: str,
    *,
    network: str = "",
    fidelity: str = "",
    ledger: str | Path | None = None,
) -> list[EvaluatedProfile]:
    """All profiles of an architecture that were measured with random channels.

    Arguments and errors are those of `ledger_lookup`.
    """
    groups = reference_groups(architecture)
    path = ledger_path(architecture) if ledger is None else Path(ledger).expanduser()
    if ledger is None and not path.is_file():
        raise ZooError(f"The registry holds no evaluations of {architecture}.")
    accuracies = defaultdict(list)
    for row in read([path]):
        widths = row.key.widths
        if len(widths) != len(groups.names) or any(map(gt, widths, groups.sizes)):
            raise ZooError(f"{path} holds evaluations of another network than {architecture}.")
        chosen = row.key.network.startswith(network) and row.key.fidelity.startswith(fidelity)
        if chosen and row.key.criterion == "random":  # others depend on the base network's weights
            accuracies[_measurement(row), widths].append(row.accuracy)
    if not accuracies:
        raise ZooError(
            f"There are no evaluations of {architecture} whose base network begins with "
            f"{network!r} and whose fidelity begins with {fidelity!r}."
        )
    return [
        EvaluatedProfile(
            dict(zip(groups.names, widths, strict=True)),
            {n: w / s for n, w, s in zip(groups.names, widths, groups.sizes, strict=True)},
            fmean(drawn),
            len(drawn),
            measurement,
        )
        for (measurement, widths), drawn in accuracies.items()
    ]


def ledger_path(architecture: str) -> Path:
    """The file of the registry for the evaluations of an architecture."""
    return registry_folder() / LEDGERS / f"{folder_name(architecture)}.parquet"


def ledger_paths() -> tuple[Path, ...]:
    """The files of the registry for the evaluations of every architecture that has any."""
    return tuple(sorted((registry_folder() / LEDGERS).glob("*.parquet")))


def _measurement(row: Row) -> Measurement:
    key = row.key
    return Measurement(key.network, key.split, key.classes, key.image_size, key.fidelity)


def _ratios(profile: Ratios, groups: ChannelGroups) -> NDArray:
    if isinstance(profile, str):
        profile = get_profile(profile)
    if isinstance(profile, Profile):
        profile = profile.keep_ratios
    if isinstance(profile, Mapping):
        if set(profile) != set(groups.names):
            raise ZooError(
                f"Keep ratios are needed for {', '.join(groups.names)}; got "
                f"{', '.join(map(str, profile)) or 'none'}."
            )
        profile = [profile[name] for name in groups.names]
    try:
        found = np.array(profile, dtype=float)
    except (TypeError, ValueError):
        found = np.array(0.0)
    if found.shape != (len(groups.names),) or not ((found > 0) & (found <= 1)).all():
        raise ZooError(
            f"One keep ratio in (0, 1] is needed for each of the {len(groups.names)} channel "
            f"groups: {', '.join(groups.names)}."
        )
    return found
