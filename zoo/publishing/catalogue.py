"""The registry as plain data: what model cards and the site both show. No number is typed here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from zoo.registry.store import (
    ProfileEntry,
    folder_name,
    get_profile,
    list_architectures,
    list_profiles,
    stored_groups,
)
from zoo.registry.weights import BundledWeights, list_weights
from zoo.spec.cost import Cost, CostModel, cost_model
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import Evidence, Profile

__all__ = [
    "BASE",
    "CataloguedArchitecture",
    "CataloguedProfile",
    "Exam",
    "Layer",
    "Row",
    "Stage",
    "catalogue",
    "comparable",
    "dominates",
    "exam_rows",
    "factor_name",
]

BASE = "base"
"""The policy of an evidence row that is the dense network."""

TOLERANCE = 1.01
"""Costs within 1 % count as equal: that is what the solver meets a factor to."""


@dataclass(frozen=True)
class Layer:
    """One channel group as it is drawn.

    Attributes:
        name: of the group.
        size: its channels in the dense network.
        side: pixels per side of its map at the reference.
    """

    name: str
    size: int
    side: int


@dataclass(frozen=True)
class Stage:
    """Neighbouring channel groups whose maps have the same size; `first` and `last` are indices."""

    side: int
    first: int
    last: int


@dataclass(frozen=True)
class Row:
    """One row of the evidence, beside the dense network and its rivals.

    Attributes:
        evidence: as the profile stores it.
        params_factor, macs_factor: dense / this network, at the profile's reference.
        dominated_by: the policies of the same exam that are more accurate with no more parameters
            and no more MACs.
    """

    evidence: Evidence
    params_factor: float
    macs_factor: float
    dominated_by: tuple[str, ...]

    @property
    def is_base(self) -> bool:
        return self.evidence.policy == BASE

    @property
    def before(self) -> float | None:
        """The mean accuracy without any training, if it was measured."""
        accuracies = self.evidence.before
        return sum(accuracies) / len(accuracies) if accuracies else None


@dataclass(frozen=True)
class Exam:
    """The rows that may be compared: of one base network on one data set."""

    data: str
    network: str
    rows: tuple[Row, ...]

    @property
    def base(self) -> Row | None:
        """The dense network."""
        return next((row for row in self.rows if row.is_base), None)

    @property
    def policies(self) -> tuple[Row, ...]:
        """All rows but the dense network's."""
        return tuple(row for row in self.rows if not row.is_base)

    @property
    def fidelities(self) -> tuple[str, ...]:
        """How the policies' networks were trained and measured."""
        return tuple(dict.fromkeys(row.evidence.fidelity for row in self.policies))

    def row(self, policy: str) -> Row | None:
        """The row of a policy, if there is one."""
        return next((row for row in self.rows if row.evidence.policy == policy), None)


@dataclass(frozen=True)
class CataloguedProfile:
    """One profile with its costs and its evidence.

    Attributes:
        reference: as `zoo.load` takes it.
        cost: of the pruned network, at the profile's reference.
        params_factor, macs_factor: dense / pruned.
    """

    reference: str
    profile: Profile
    cost: Cost
    params_factor: float
    macs_factor: float
    exams: tuple[Exam, ...]

    @property
    def slug(self) -> str:
        """The reference as a file name or an anchor."""
        return self.reference.rpartition(":")[2].rpartition("/")[2]

    @property
    def origin(self) -> str:
        """`searched` or `published`."""
        return self.profile.policy


@dataclass(frozen=True)
class CataloguedArchitecture:
    """One stored architecture, with everything the registry holds of it.

    Attributes:
        folder: its name as a portable file name.
        cost: of the dense network, at `num_classes` and `image_size`.
        layers: its channel groups in order.
        whole: modules whose channels stay whole.
        borrows: the architecture whose profiles it uses; "" if none.
    """

    name: str
    folder: str
    cost: Cost
    num_classes: int
    image_size: int
    layers: tuple[Layer, ...]
    whole: int
    profiles: tuple[CataloguedProfile, ...]
    weights: tuple[BundledWeights, ...]
    borrows: str

    @property
    def has_card(self) -> bool:
        """Whether there is more to say of it than its channel groups."""
        return bool(self.profiles or self.weights)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Its layers by the size of their maps; one position, as after pooling, breaks none."""
        sides = list(itertools.accumulate((layer.side for layer in self.layers), _carried))
        found, first = [], 0
        for side, run in itertools.groupby(sides):
            length = len(list(run))
            found.append(Stage(side, first, first + length - 1))
            first += length
        return tuple(found)


def catalogue() -> tuple[CataloguedArchitecture, ...]:
    """Every stored architecture: those with searched profiles first, then published, then others.

    Raises:
        ZooError: for a broken registry, or a published profile whose counts timm no longer holds.
    """
    entries = [*list_profiles(), *list_profiles(source="published")]
    found = [
        _architecture(name, [entry for entry in entries if entry.architecture == name])
        for name in list_architectures()
    ]
    return tuple(sorted(found, key=_rank))


def comparable(of: CataloguedArchitecture) -> list[tuple[str, list[tuple[str, Exam]]]]:
    """(title, exams by factor) of the same data, network and training, over all profiles."""
    found: dict[tuple[str, str, tuple[str, ...]], list[tuple[str, Exam]]] = {}
    for one in of.profiles:
        for exam in one.exams:
            key = exam.data, exam.network, exam.fidelities
            found.setdefault(key, []).append((factor_name(one.profile), exam))
    return [(f"{data}; {'; '.join(how)}", exams) for (data, _, how), exams in found.items()]


def factor_name(profile: Profile) -> str:
    """The factor and its metric, as `4x MACs`."""
    return f"{profile.cf:g}x {'MACs' if profile.metric == 'macs' else profile.metric}"


def dominates(one: Evidence, other: Evidence) -> bool:
    """Whether `one` is more accurate with no more parameters and no more MACs, within 1 %."""
    return (
        one.mean > other.mean
        and one.params <= TOLERANCE * other.params
        and one.macs <= TOLERANCE * other.macs
    )


def _architecture(name: str, entries: Iterable[ProfileEntry]) -> CataloguedArchitecture:
    from zoo.models import architecture  # imports torch

    groups, known = stored_groups(name), architecture(name)
    assert groups is not None, name
    model = cost_model(groups)
    profiles = tuple(_profile(entry.reference, model) for entry in entries)
    return CataloguedArchitecture(
        name=name,
        folder=folder_name(name),
        cost=model.dense,
        num_classes=known.num_classes,
        image_size=known.image_size,
        layers=_layers(groups),
        whole=len(groups.unprunable),
        profiles=profiles,
        weights=tuple(list_weights(name)),
        borrows="" if profiles else _lender(name, known.profiles_from),
    )


def _lender(name: str, other: str) -> str:
    """The architecture whose profiles `name` uses, if that has any."""
    return other if other and list_profiles(arch=name) else ""


def _layers(groups: ChannelGroups) -> tuple[Layer, ...]:
    def side(filters: Iterable[str]) -> int:
        counts = [groups.positions[name] for name in filters if name in groups.positions]
        return math.isqrt(max(counts, default=1))

    return tuple(Layer(group.name, group.size, side(group.filters)) for group in groups.groups)


def _profile(reference: str, model: CostModel) -> CataloguedProfile:
    profile = get_profile(reference)
    cost = model(list(profile.kept.values()))
    exams = dict.fromkeys(row.exam for row in profile.evidence)
    return CataloguedProfile(
        reference=reference,
        profile=profile,
        cost=cost,
        params_factor=model.dense.params / cost.params,
        macs_factor=model.dense.macs / cost.macs,
        exams=tuple(
            Exam(*exam, exam_rows([row for row in profile.evidence if row.exam == exam], model))
            for exam in exams
        ),
    )


def exam_rows(rows: list[Evidence], model: CostModel) -> tuple[Row, ...]:
    """The rows of one exam, beside the dense network and each other."""
    policies = [row for row in rows if row.policy != BASE and not row.standard]
    return tuple(
        Row(
            evidence=row,
            params_factor=model.dense.params / row.params,
            macs_factor=model.dense.macs / row.macs,
            dominated_by=()
            if row not in policies
            else tuple(other.policy for other in policies if dominates(other, row)),
        )
        for row in rows
    )


def _carried(before: int, side: int) -> int:
    return before if side == 1 else side


def _rank(architecture: CataloguedArchitecture) -> tuple[int, str]:
    origins = {profile.origin for profile in architecture.profiles}
    if "searched" in origins:
        return 0, architecture.name
    if origins:
        return 1, architecture.name
    return (2 if architecture.weights else 3), architecture.name
