"""Profiles: how much of each channel group to keep, and the evidence for it. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from zoo.common.documents import decode_document, encode_document, read_json, write_json
from zoo.errors import DocumentError, unknown
from zoo.spec.certificate import Certificate

__all__ = [
    "METRICS",
    "SIBLING",
    "STANDARD",
    "Evidence",
    "Metric",
    "Profile",
    "Provenance",
    "Publication",
    "Reference",
]

Metric = Literal["params", "macs", "latency"]
"""What a compression factor counts."""
METRICS: tuple[Metric, ...] = get_args(Metric)

SIBLING = "sibling"
"""The policy of evidence that was trained from scratch, once for each base network."""

STANDARD = ", recipe standard"
"""Ends the policy of evidence that was trained as users do; other rows share one short recipe."""


_NAME = re.compile(r"(?:\w+:)?\w[\w.-]*")
"""What an architecture may be called."""


@dataclass(frozen=True)
class Reference:
    """The network that a profile's factor is stated for: its classes and image size in pixels."""

    num_classes: int
    image_size: int


@dataclass(frozen=True)
class Evidence:
    """Accuracy of one policy at this profile's factor: mean and standard deviation over seeds.

    Attributes:
        policy: `searched`, `equal`, `greedy`, ...; `base` is the dense network; `SIBLING` was
            trained from scratch; with `STANDARD` at its end it was trained longer and with a
            teacher.
        params, macs: of the network measured, at the reference.
        accuracies: in [0, 1], one per seed.
        before: accuracies before any fine-tuning (batch-norm statistics recalibrated).
        fidelity: how it was trained and measured.
        data: the data set and split.
        network: sha256 of the base network's checkpoint.
    """

    policy: str
    params: int
    macs: int
    mean: float
    sd: float
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    fidelity: str
    data: str
    before: tuple[float, ...] = ()
    network: str = ""

    @property
    def standard(self) -> bool:
        """Whether it was trained as users do, so that other rows are no rivals of it."""
        return self.policy.endswith(STANDARD)

    @property
    def exam(self) -> tuple[str, str]:
        """What rows must share to be compared: the data and the base network."""
        return self.data, self.network


@dataclass(frozen=True)
class Provenance:
    """Where a profile comes from, complete enough to run it again."""

    command: str
    agent: str
    seed: int
    episodes: int
    evaluations: int
    seconds: float
    tasks: tuple[str, ...]
    split_digest: str
    fidelity: str
    machine: str
    date: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Publication:
    """Where published channel counts come from.

    Attributes:
        source: the paper, and the file of the authors that the counts were read from.
        licence: of that file, as SPDX writes it.
        claimed: the authors' word on its accuracy, by their own training; not measured here.
        note: what else to know.
    """

    source: str
    licence: str
    claimed: str = ""
    note: str = ""


@dataclass(frozen=True)
class Profile:
    """One keep ratio per channel group of an architecture, for one factor of one metric.

    Attributes:
        keep_ratios: group name -> fraction of channels kept, in (0, 1].
        kept: group name -> channels kept; what `zoo.load` applies, verbatim.
        reference: the network for which the nominal factor `cf` is exactly `got`.
        policy: `searched` or `published`.
        published: where the channel counts of a `published` one come from.
        certificate: what its evidence proves.
    """

    architecture: str
    metric: str
    cf: float
    got: float
    reference: Reference
    keep_ratios: dict[str, float]
    kept: dict[str, int]
    policy: str = "searched"
    provenance: Provenance | None = None
    evidence: tuple[Evidence, ...] = ()
    published: Publication | None = None
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        where = f"profile of {self.architecture}"
        if not _NAME.fullmatch(self.architecture):  # it becomes the name of a folder
            raise DocumentError(f"{where}: that is not the name of an architecture.")
        if self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS, DocumentError)
        if not self.cf >= 1:
            raise DocumentError(f"{where}: the factor must be at least 1, got {self.cf}.")
        for name, ratio in self.keep_ratios.items():
            if not 0 < ratio <= 1:
                raise DocumentError(f"{where}: β of {name!r} is {ratio}; it must be in (0, 1].")
        if set(self.kept) != set(self.keep_ratios):
            odd = sorted(set(self.kept) ^ set(self.keep_ratios))[0]
            raise DocumentError(f"{where}: {odd!r} is not in both keep_ratios and kept.")
        for name, count in self.kept.items():
            if count < 1:
                raise DocumentError(f"{where}: {name!r} keeps {count} channels; at least 1 needed.")

    @property
    def name(self) -> str:
        """`<metric>-cf<factor>`, the file name in the registry."""
        return f"{self.metric}-cf{self.cf:g}"

    def to_json(self) -> dict[str, Any]:
        """The profile as a JSON document with its schema version."""
        return encode_document(self)

    @classmethod
    def from_json(cls, raw: Any, where: str = "profile") -> Profile:
        """The profile that a document describes.

        Raises:
            DocumentError: for unknown or missing keys, another schema version, or β outside (0, 1].
        """
        return decode_document(cls, raw, where)

    @classmethod
    def read(cls, path: Path) -> Profile:
        """The profile in the JSON file at `path`."""
        return cls.from_json(read_json(path), str(path))

    def write(self, path: Path) -> None:
        """Write the profile to `path`, atomically."""
        write_json(path, self.to_json())
