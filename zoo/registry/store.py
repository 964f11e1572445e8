"""The registry of profiles: references to `Profile`s, and the stored groups of architectures.

A reference names its source: `bundled:<architecture>/<metric>-cf<k>`, `published:<name>`,
`file:<path>`, or `hf:[datasets/]<org>/<repo>[/<path>][@<revision>]`. A reference to the Hub is
pinned to the commit that it is read from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from zoo.common.digests import sha256_of
from zoo.common.documents import decode_document, encode_document, read_json, write_json
from zoo.errors import DocumentError, FactorError, ZooError, unknown
from zoo.registry import hub
from zoo.registry.published import digest_of, read_published
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import METRICS, Profile

__all__ = [
    "INDEX",
    "PUBLISHED",
    "ProfileEntry",
    "architecture_of",
    "digest_of_profile",
    "find_profile",
    "get_profile",
    "index_entry",
    "is_registry",
    "list_architectures",
    "list_profiles",
    "pinned",
    "profile_path",
    "read_entries",
    "read_groups",
    "registry_folder",
    "searched_profile",
    "store_groups",
    "stored_groups",
    "untagged",
    "write_entries",
    "write_index",
    "write_published_index",
]


INDEX = "index.json"

PUBLISHED = "published"
"""The registry's folder of profiles that others published; one with its own index."""


@dataclass(frozen=True)
class ProfileEntry:
    """One profile in an index: enough to choose it and to check its file."""

    reference: str
    architecture: str
    metric: str
    cf: float
    got: float
    sha256: str


@dataclass(frozen=True)
class _Index:
    profiles: tuple[ProfileEntry, ...]


def registry_folder() -> Path:
    """The bundled registry: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_registry", package.parent / "registry"):
        if (folder / INDEX).is_file():
            return folder
    raise ZooError(f"The bundled registry is missing from {package}; reinstall prunezoo.")


def folder_name(architecture: str) -> str:
    """An architecture's name as a portable folder name; `architecture_of` turns it back."""
    return architecture.replace(":", "--")


def architecture_of(folder: str) -> str:
    """The architecture whose `folder_name` is `folder`."""
    return folder.replace("--", ":")


def untagged(architecture: str) -> str:
    """A name without the tag, as `.a1_in1k`, by which timm tells the weights of a network apart."""
    return architecture.partition(".")[0]


def list_architectures() -> list[str]:
    """The architectures whose channel groups are bundled; any other is traced when it is pruned."""
    folders = sorted(path.parent.name for path in registry_folder().glob("*/groups.json"))
    return list(map(architecture_of, folders))


def list_profiles(
    *, arch: str | None = None, metric: str | None = None, source: str = "bundled"
) -> list[ProfileEntry]:
    """The profiles of a source, optionally of one architecture or metric.

    Args:
        arch: an architecture's name.
        metric: `params`, `macs` or `latency`.
        source: `bundled`, `published` for those that others found, or
            `hf:[datasets/]<org>/<repo>[@<revision>]` for a repository with an index.json; its
            references are pinned to the commit that was read.

    Returns:
        The profiles in the order of the index. For an architecture without any, those of its
        `profiles_from`: provisional, because they were searched and measured there.

    Raises:
        ZooError: for an unknown architecture, metric or source.
    """
    if metric is not None and metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    entries = _index(source)
    arch = None if arch is None else untagged(arch)
    if arch is not None and arch not in {entry.architecture for entry in entries}:
        from zoo.models import architecture  # imports torch, which other calls do not need

        arch = architecture(arch).profiles_from or arch
    return [
        entry
        for entry in entries
        if (arch is None or entry.architecture == arch)
        and (metric is None or entry.metric == metric)
    ]


def find_profile(
    arch: str, cf: float, metric: str = "params", source: str = "bundled"
) -> tuple[str, Profile]:
    """(reference, profile): what a source has for an architecture at a factor of `metric`.

    It is provisional when its architecture is not `arch`, as in `list_profiles`.

    Raises:
        FactorError: when there is none; the message names those that exist and an alternative.
        ZooError: for an unknown architecture or source.
    """
    found = searched_profile(arch, cf, metric, source)
    if found is not None:
        return found
    entries = list_profiles(arch=arch, source=source)
    own = [f"{e.cf:g}x {e.metric}" for e in entries]
    listing = f"it has {', '.join(own)}" if own else f"{arch} has none"
    if source != "bundled":
        raise FactorError(f"{source} has no profile of {arch} at {cf:g}x {metric}: {listing}.")
    published = [entry.reference for entry in list_profiles(arch=arch, source="published")]
    others = f" Published by others: {', '.join(published)}." if published else ""
    near = [entry.reference for entry in entries if entry.metric == metric]
    rescaled = f", {near[0]!r} with refit=True too" if near else ""
    raise FactorError(
        f"No searched profile of {arch} at {cf:g}x {metric}: {listing}.{others} "
        f"profile='best' (or a policy, such as 'equal') works at any factor{rescaled}."
    )


def searched_profile(
    arch: str, cf: float, metric: str = "params", source: str = "bundled"
) -> tuple[str, Profile] | None:
    """What `find_profile` finds; None where there is none.

    Raises:
        ZooError: for an unknown architecture or source.
    """
    for entry in list_profiles(arch=arch, source=source):
        if (entry.metric, entry.cf) == (metric, float(cf)):
            profile = get_profile(entry.reference)
            if source.startswith(hub.PREFIX) and digest_of_profile(entry.reference) != entry.sha256:
                raise DocumentError(f"{entry.reference} is not the file that the index lists.")
            return entry.reference, profile
    return None


def get_profile(ref: str) -> Profile:
    """The profile that a reference names.

    Args:
        ref: `bundled:<architecture>/<name>`, `published:<name>`, `file:<path>`, or
            `hf:[datasets/]<org>/<repo>/<path>[@<rev>]`.

    Raises:
        ZooError: for a reference without a source, or a profile that does not exist; the message
            gives the valid ones.
        DocumentError: for a malformed profile, or a bundled one that differs from the index.
    """
    source, _, rest = ref.partition(":")
    if source == "bundled" and rest:
        path = registry_folder() / _bundled_path(rest)
        digests = {entry.reference: entry.sha256 for entry in list_profiles()}
        if ref not in digests:
            raise unknown("profile", ref, digests)
        return _whole(path, digests[ref])
    if source == "published":
        entries = {entry.reference: entry for entry in _index("published")}
        if ref not in entries:
            raise unknown("published profile", ref, entries)
        path = registry_folder() / PUBLISHED / f"{rest}.json"
        if digest_of(path) != entries[ref].sha256:
            raise DocumentError(f"{path} is not the file that the registry's index lists.")
        return _read_published(path)
    if source == "file" and rest:
        return Profile.read(Path(rest).expanduser())
    if source == "hf" and rest:
        reference = hub.HubReference.parse(ref)
        if reference.path is None:
            raise unknown("profile", ref, [entry.reference for entry in _index(ref)])
        return Profile.read(hub.download(reference)[0])
    raise ZooError(
        f"The profile reference {ref!r} names no source: write 'bundled:<architecture>/<name>', "
        f"'published:<name>', 'file:{ref}' or 'hf:<org>/<repo>[/<path>][@<revision>]'."
    )


def is_registry(ref: str) -> bool:
    """Whether a reference is to a Hub repository as a whole, which holds many profiles."""
    return ref.startswith(hub.PREFIX) and hub.HubReference.parse(ref).path is None


def pinned(ref: str) -> str:
    """The reference to a file of the Hub, at the commit that it is read from; others as they are.

    Raises:
        ZooError: if the file cannot be had.
    """
    if not ref.startswith(hub.PREFIX):
        return ref
    return str(hub.download(hub.HubReference.parse(ref))[1])


def digest_of_profile(ref: str) -> str | None:
    """sha256 of the document that a reference names; None for a policy, or where it is not here."""
    source, _, rest = ref.partition(":")
    if source in ("bundled", PUBLISHED):
        return {entry.reference: entry.sha256 for entry in _index(source)}.get(ref)
    try:
        if source == "file":
            path = Path(rest).expanduser()
        elif source == "hf":
            path, _ = hub.download(hub.HubReference.parse(ref))
        else:
            return None
        return sha256_of(path)
    except (ZooError, OSError):
        return None


def _whole(path: Path, sha256: str) -> Profile:
    profile = Profile.read(path)
    if sha256_of(path) != sha256:
        raise DocumentError(f"{path} is not the file that the registry's index lists.")
    return profile


def _read_published(path: Path) -> Profile:
    arch = str(read_json(path).get("architecture"))
    groups = stored_groups(arch)
    if groups is None:
        raise DocumentError(f"{path}: the channel groups of {arch!r} are not stored.")
    return read_published(path, groups)


def _bundled_path(name: str) -> Path:
    architecture, _, file = name.rpartition("/")
    if not architecture or name.startswith("/") or ".." in name or "\\" in name:
        raise ZooError(f"Expected bundled:<architecture>/<metric>-cf<k>, got 'bundled:{name}'.")
    return Path(folder_name(architecture)) / f"{file}.json"


def stored_groups(arch: str) -> ChannelGroups | None:
    """The channel groups of a registered architecture at its reference; None if not stored."""
    name = folder_name(untagged(arch))
    if "/" in name or "\\" in name:
        return None
    path = registry_folder() / name / "groups.json"
    return read_groups(path) if path.is_file() else None


def read_groups(path: Path) -> ChannelGroups:
    """The channel groups in the file at `path`.

    Raises:
        DocumentError: for a malformed document.
    """
    groups = _read_groups(path, path.stat().st_mtime_ns)
    return replace(  # copies of the dictionaries, because all callers share the cached groups
        groups,
        shapes=dict(groups.shapes),
        positions=dict(groups.positions),
        unprunable=dict(groups.unprunable),
        attributes=dict(groups.attributes),
    )


@functools.cache
def _read_groups(path: Path, _: int) -> ChannelGroups:
    return decode_document(ChannelGroups, read_json(path), str(path))


def store_groups(arch: str, groups: ChannelGroups, folder: Path) -> None:
    """Write an architecture's groups into the registry at `folder`."""
    path = folder / folder_name(arch) / "groups.json"
    write_json(path, encode_document(groups, terse=True), indent=None)


def write_index(folder: Path) -> None:
    """Rebuild the index of the registry at `folder` from its profiles."""
    write_entries(folder, map(index_entry, folder.glob("*/*-cf*.json")))


def index_entry(path: Path) -> ProfileEntry:
    """What an index says of the profile in the file at `path`."""
    profile = Profile.read(path)
    return ProfileEntry(
        reference=f"bundled:{profile.architecture}/{path.stem}",
        architecture=profile.architecture,
        metric=profile.metric,
        cf=profile.cf,
        got=profile.got,
        sha256=sha256_of(path),
    )


def read_entries(folder: Path) -> tuple[ProfileEntry, ...]:
    """The index of the registry at `folder`.

    Raises:
        DocumentError: when it is missing or malformed.
    """
    path = folder / INDEX
    return decode_document(_Index, read_json(path), str(path)).profiles


def write_entries(folder: Path, entries: Iterable[ProfileEntry]) -> None:
    """Write the index of the registry at `folder`, in order of architecture, metric and factor."""
    ordered = sorted(entries, key=lambda entry: (entry.architecture, entry.metric, entry.cf))
    write_json(folder / INDEX, encode_document(_Index(tuple(ordered))))


def profile_path(entry: ProfileEntry) -> str:
    """Where the file of an index's profile lies in its registry."""
    return _bundled_path(entry.reference.removeprefix("bundled:")).as_posix()


def write_published_index(folder: Path) -> None:
    """Make the index of the published profiles of the registry at `folder` anew."""
    entries = []
    for path in sorted((folder / PUBLISHED).glob("*.json")):
        if path.name != "index.json":
            profile = _read_published(path)
            reference, digest = f"published:{path.stem}", digest_of(path)
            entries.append(
                ProfileEntry(
                    reference, profile.architecture, profile.metric, profile.cf, profile.got, digest
                )
            )
    entries.sort(key=lambda entry: (entry.architecture, entry.cf, entry.reference))
    write_json(folder / PUBLISHED / INDEX, encode_document(_Index(tuple(entries))))


def _index(source: str) -> tuple[ProfileEntry, ...]:
    if source == PUBLISHED:
        folder = registry_folder() / PUBLISHED
        return read_entries(folder) if (folder / INDEX).is_file() else ()
    if source == "bundled":
        return read_entries(registry_folder())
    if not source.startswith(hub.PREFIX):
        raise unknown("profile source", source, ["bundled", "published", "hf:<org>/<repo>"])
    path, found = hub.download(hub.HubReference.parse(source).alone().file(INDEX))
    return tuple(
        replace(entry, reference=str(found.file(profile_path(entry))))
        for entry in read_entries(path.parent)
    )
