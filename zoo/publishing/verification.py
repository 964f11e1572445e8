"""`zoo.verify`: whether what a folder or a reference holds is whole, and what it says is true."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.common.digests import sha256_of
from zoo.common.documents import read_json
from zoo.common.sizes import sides
from zoo.errors import ZooError, first_line
from zoo.publishing.checksums import CHECKSUMS, files_in, read_checksums
from zoo.publishing.model_repository import CONFIG, config_of
from zoo.publishing.options import FILES
from zoo.registry.hub import PREFIX, HubReference, checked_path, download, files_of
from zoo.registry.published import digest_of, read_published
from zoo.registry.store import (
    INDEX,
    PUBLISHED,
    ProfileEntry,
    architecture_of,
    get_profile,
    index_entry,
    pinned,
    profile_path,
    read_entries,
    read_groups,
    registry_folder,
    stored_groups,
)
from zoo.spec.cost import cost_model
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import PruningRecord, record_of
from zoo.spec.profile import Profile
from zoo.storage.artefacts import MODEL, read_model, skeleton_of
from zoo.storage.checkpoints import RECORD, read_safetensors
from zoo.tracing.known_groups import groups_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Verification", "verify"]

NOISE_IMAGES = 16

MOST_VALUES = 1 << 24
"""Numbers in the noise that ONNX files are compared on, at most."""

TOLERANCE = {"fp32": 1e-3, "fp16": 0.05}
"""Precision -> largest difference of a logit, as a share of the largest."""

Check = tuple[str, Callable[[], Iterable[str]]]
"""What is right if nothing is wrong, and what finds what is wrong, a line each."""


class Unchecked(str):
    """A line that is not wrong: what a check could not look at."""


class Skipped(Unchecked):
    """Why a check was not made at all."""


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what was found.

    Attributes:
        what: the reference, pinned if it is the Hub's, or the folder.
        passed: what is right, a line each.
        failed: what is not, a line each.
        unchecked: what could not be looked at, and why, a line each.
    """

    what: str
    passed: tuple[str, ...]
    failed: tuple[str, ...]
    unchecked: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failed


def verify(what: str | Path) -> Verification:
    """Check a pruned network, a profile or a registry: a folder's, or that of a reference.

    Of all: schemas, and the sha256 of every file where there is a list of them. Of a network: its
    tensors fit its record, costs and factor follow from its widths, its config says the same, and
    its ONNX files are its own, with PyTorch's logits on noise in fp32 and fp16. Of profiles:
    groups, widths and factors are those of the architecture. Nothing that came with them is
    executed, and no reference in them is followed.

    Args:
        what: a folder, the reference of a profile, `hf:[datasets/]<org>/<repo>[@<revision>]`, or
            `bundled` for the registry that ships with the zoo.

    Raises:
        ZooError: if there is nothing to check: no such folder, repository or profile.
    """
    if not isinstance(what, str | Path) or not str(what):
        raise ZooError(f"Verify a folder or a reference, not {type(what).__name__}.")
    text = str(what)
    if text == "bundled":
        return _folder(registry_folder(), text)
    if text.startswith(PREFIX) and HubReference.parse(text).path is None:
        names, reference = files_of(HubReference.parse(text))
        if not {RECORD, INDEX} & set(names):
            raise _neither(str(reference))
        paths = [download(reference.file(name))[0] for name in names]
        return _folder(paths[0].parents[names[0].count("/")], str(reference))
    folder = Path(what).expanduser()
    if folder.is_dir():
        return _folder(folder, text)
    reference_of = pinned(text) if ":" in text else f"file:{folder}"
    profile = get_profile(reference_of)
    groups = stored_groups(profile.architecture)
    told = "groups, widths and factor are the architecture's"
    return _run(reference_of, [(told, lambda: _wrong_profile(profile, groups))])


def _run(what: str, checks: Iterable[Check]) -> Verification:
    passed, failed, unchecked = list[str](), list[str](), list[str]()
    for told, wrong in checks:
        try:
            lines = list(wrong())
        except Exception as error:  # a hostile document can fail anywhere
            lines = [first_line(error) if isinstance(error, ZooError) else f"not true: {told}"]
        unknown = [line for line in lines if isinstance(line, Unchecked)]
        unchecked += unknown
        failed += [line for line in lines if not isinstance(line, Unchecked)]
        skipped = any(isinstance(line, Skipped) for line in unknown)
        passed += [told] if len(unknown) == len(lines) and not skipped else []
    return Verification(what, tuple(passed), tuple(failed), tuple(unchecked))


def _folder(folder: Path, told: str) -> Verification:
    network, registry = (folder / RECORD).is_file(), (folder / INDEX).is_file()
    if not network and not registry:
        raise _neither(told)
    # chained, not listed: what a check has read is there for those that follow it
    return _run(
        told,
        chain(
            [_files_check(folder)],
            _network_checks(folder) if network else (),
            _registry_checks(folder) if registry else (),
        ),
    )


def _neither(told: str) -> ZooError:
    return ZooError(f"{told} holds no pruned network ({RECORD}) and no registry ({INDEX}).")


def _files_check(folder: Path) -> Check:
    def wrong() -> Iterator[str]:
        listed = read_checksums(folder)
        if listed is None:
            return
        present = set(files_in(folder)) - {CHECKSUMS}
        for name, wanted in listed.items():
            if name not in present:
                yield f"{name} is missing"
            elif sha256_of(folder / name) != wanted:
                yield f"{name} is not the file that {CHECKSUMS} lists"
        for name in sorted(present - set(listed)):
            yield Unchecked(f"{name} is not listed in {CHECKSUMS}: it lies beside the publication")

    if (folder / CHECKSUMS).is_file():
        return f"every file that was published has the sha256 in {CHECKSUMS}", wrong
    unknown = f"there is no {CHECKSUMS}: whether files were changed is not known"
    return unknown, lambda: [Skipped(unknown)]


def _network_checks(folder: Path) -> Iterator[Check]:
    models: list[nn.Module] = []
    unknown = f"{RECORD} is of no registered architecture: nothing can be compared"
    own = _of_no_architecture(folder)

    def tensors() -> Iterator[str]:
        if own:
            read_safetensors(folder / MODEL)
            yield Skipped(unknown)
        else:
            models.append(read_model(folder))

    yield unknown if own else f"the tensors fit {RECORD}", tensors
    if not models:
        return
    (model,) = models
    record = record_of(model)
    assert record is not None
    yield "costs and factor follow from the widths", lambda: _wrong_costs(record)
    if (folder / CONFIG).is_file():
        yield (
            f"{CONFIG} says what {RECORD} says",
            lambda: _wrong_config(read_json(folder / CONFIG), record),
        )
    for precision, name in FILES.items():
        if (folder / name).is_file():
            yield (
                f"{name} is an export of this network",
                partial(_wrong_file, folder, name, precision, model, record),
            )


def _of_no_architecture(folder: Path) -> bool:
    """Whether the record can be read and names none."""
    with suppress(Exception):  # what is wrong with it, a check says
        return not PruningRecord.read(folder / RECORD).architecture
    return False


def _wrong_config(told: object, record: PruningRecord) -> Iterator[str]:
    labels = told.get("id2label") if isinstance(told, dict) else None
    if not isinstance(told, dict) or not isinstance(labels, dict):
        yield f"{CONFIG} is not an object with id2label"
        return
    if len(labels) != record.num_classes:
        yield f"{CONFIG} names {len(labels)} classes, the network has {record.num_classes}"
    wanted = config_of(record, tuple(map(str, labels.values())))
    for key, value in wanted.items():
        if told.get(key) != value:
            yield f"{CONFIG}: {key} is {reprlib.repr(told.get(key))}, by {RECORD} {value!r}"
    for key in sorted(set(told) - {*wanted, "profile_sha256"}):
        yield f"{CONFIG} has the key {reprlib.repr(key)}, which the zoo does not write"


def _wrong_file(
    folder: Path, name: str, precision: str, model: nn.Module, record: PruningRecord
) -> Iterator[str]:
    import torch

    from zoo.deployment.parity import compare_outputs
    from zoo.deployment.runtime import InferenceSession

    session = InferenceSession(folder / name, "CPUExecutionProvider")
    facts = session.metadata
    if (facts.architecture, facts.profile) != (record.architecture, record.plan.profile):
        yield f"{name} is another network's: {facts.architecture} by {facts.profile}"
        return
    if facts.precision != precision:
        yield f"{name} says that it is of {facts.precision}, its name that it is of {precision}"
        return
    tolerance = TOLERANCE.get(precision)
    shape = (NOISE_IMAGES, record.in_channels, *sides(record.size))
    if tolerance is None or math.prod(shape) > MOST_VALUES:  # int8's ranges are those of pictures
        yield Skipped(f"{name} was not compared with PyTorch: {precision} of {shape[2:]}")
        return
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(images)
    difference = compare_outputs((wanted,), (session(images),), 0.0).relative_difference
    if not difference <= tolerance:
        yield f"{name} differs from PyTorch by {difference:.2g} of the largest logit on noise"


def _wrong_costs(record: PruningRecord) -> Iterator[str]:
    """What the record says of its costs and the architecture's groups do not."""
    plan = record.plan
    groups = groups_of(record.architecture, skeleton_of(record), record.size, record.in_channels)
    costs = cost_model(groups)
    widths = [plan.widths[name] for name in groups.names]
    for kind, told, found in (
        ("dense", plan.dense, costs.dense),
        ("pruned", plan.pruned, costs(widths)),
    ):
        for metric in ("params", "macs"):
            if getattr(told, metric) != getattr(found, metric):
                yield (
                    f"{RECORD}: {kind} {metric} are {getattr(told, metric):,}, by the widths "
                    f"{getattr(found, metric):,}"
                )
    if plan.metric != "latency":
        got = costs.factor(widths, plan.metric)
        if not math.isclose(got, plan.got, rel_tol=1e-9):
            yield f"{RECORD}: the factor is {plan.got:.6g}, by the widths {got:.6g}"


def _registry_checks(folder: Path) -> Iterator[Check]:
    entries = list[ProfileEntry]()

    def index() -> Iterator[str]:
        entries.extend(read_entries(folder))
        listed = {profile_path(entry) for entry in entries}
        for path in sorted(folder.glob("*/*-cf*.json")):
            name = path.relative_to(folder).as_posix()
            if name not in listed:
                yield f"{name} is not in {INDEX}"

    yield f"{INDEX} lists every profile", index
    for path in sorted(folder.glob("*/groups.json")):
        name = path.relative_to(folder).as_posix()
        yield f"{name} is the architecture's", lambda path=path: _wrong_groups(path)  # type: ignore[misc]
    for entry in entries:
        yield (
            f"{entry.reference}: groups, widths and factor are the architecture's",
            lambda entry=entry: _wrong_entry(folder, entry),  # type: ignore[misc]
        )

    if (folder / PUBLISHED / INDEX).is_file():
        yield "the published profiles are what their index says", lambda: _wrong_published(folder)


def _wrong_published(folder: Path) -> Iterator[str]:
    for entry in read_entries(folder / PUBLISHED):
        path = folder / PUBLISHED / f"{checked_path(entry.reference.rpartition(':')[2])}.json"
        groups = stored_groups(entry.architecture)
        if digest_of(path) != entry.sha256:
            yield f"{PUBLISHED}/{path.name} is not the file that its index lists"
        elif groups is None:
            yield Unchecked(f"the groups of {entry.architecture} are not known here")
        else:
            for line in _wrong_profile(read_published(path, groups), groups):
                yield f"{PUBLISHED}/{path.name}: {line}"


def _wrong_groups(path: Path) -> Iterator[str]:
    known = stored_groups(architecture_of(path.parent.name))
    if known is not None and known != read_groups(path):
        yield f"{path.parent.name}/groups.json differs from what this version knows"


def _wrong_entry(folder: Path, entry: ProfileEntry) -> Iterator[str]:
    path = folder / profile_path(entry)
    if index_entry(path) != entry:
        yield f"{profile_path(entry)} is not what {INDEX} says"
    groups = path.parent / "groups.json"
    own = read_groups(groups) if groups.is_file() else stored_groups(entry.architecture)
    for line in _wrong_profile(Profile.read(path), own):
        yield type(line)(f"{profile_path(entry)}: {line}")


def _wrong_profile(profile: Profile, groups: ChannelGroups | None) -> Iterator[str]:
    """What a profile says and its architecture's groups do not."""
    if groups is None:
        yield Unchecked(f"the groups of {profile.architecture} are not known here")
        return
    if set(profile.kept) != set(groups.names):
        yield f"its groups are not those of {profile.architecture}"
        return
    for group in groups.groups:
        kept, ratio = profile.kept[group.name], profile.keep_ratios[group.name]
        if kept > group.size or abs(kept - ratio * group.size) > 1:
            yield f"{group.name} keeps {kept} of {group.size} channels, at the ratio {ratio:.3g}"
            return
    if profile.metric == "latency":
        return
    widths = [profile.kept[name] for name in groups.names]
    got = cost_model(groups).factor(widths, profile.metric)
    if not math.isclose(got, profile.got, rel_tol=1e-9):
        yield f"the factor is {profile.got:.6g}, by the widths {got:.6g}"
