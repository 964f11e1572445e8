"""`zoo.publish`: a pruned network, a profile or a registry becomes a repository of the Hub."""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from zoo.common.documents import read_text
from zoo.data.images import AnyImages
from zoo.errors import DocumentError, ZooError
from zoo.publishing.checksums import CHECKSUMS, read_checksums
from zoo.publishing.model_repository import write_repository
from zoo.publishing.options import PublishOptions
from zoo.publishing.registry_repository import add_profile, write_registry
from zoo.registry.hub import HubReference, card_parts, download
from zoo.registry.hub_commits import Head, Published, commit_folder, read_head
from zoo.registry.store import (
    INDEX,
    get_profile,
    list_architectures,
    read_entries,
    registry_folder,
)
from zoo.spec.plans import PruningRecord
from zoo.spec.profile import Profile
from zoo.storage.artefacts import README
from zoo.storage.checkpoints import RECORD

__all__ = ["publish"]

OWN_LICENCE = "apache-2.0"
"""Of the registry that ships with the zoo."""

REFERENCES = ("bundled:", "file:", "published:", "hf:")
"""How the reference of a profile begins."""


def publish(
    what: str | Path | Profile,
    repo_id: str,
    *,
    private: bool = True,
    data: AnyImages | None = None,
    dry_run: bool = False,
    options: PublishOptions | None = None,
) -> Published:
    """Publish to the Hugging Face Hub, in one commit on what the repository held before.

    Nothing is sent when the repository holds all of it already. A network's repository has the
    layout that `zoo.load_pruned`, ONNX Runtime and transformers.js read; profiles make a data set,
    which `profile="hf:datasets/<repo_id>"` reads.

    Args:
        what: the folder of a pruned network, a registry's folder, `bundled` for the one that ships
            with the zoo, a `Profile` or the reference of one; a profile is added to those that the
            repository holds.
        repo_id: `<org>/<repo>`; created if there is none.
        private: of a new repository; an existing one stays as it is.
        data: for a network: images with labels that its accuracy is measured on and its ONNX files
            are compared on, and whose classes, mean and std are published. int8 needs it.
        dry_run: make everything, send nothing.
        options: what else to say of a network.

    Returns:
        What was sent, with the commit.

    Raises:
        ZooError: for anything else to publish; a repository that holds other things, cannot be
            written or was changed meanwhile.
        ExportError: if an ONNX file does not compute what the network does.
    """
    options = options or PublishOptions()
    if not isinstance(what, str | Path | Profile) or not isinstance(repo_id, str):
        raise ZooError(
            f"Publish a folder, a profile or its reference to 'org/repo'; got "
            f"{type(what).__name__} to {type(repo_id).__name__}. zoo.save writes a network to a "
            f"folder."
        )
    folder = _folder(what)
    network = folder is not None and (folder / RECORD).is_file()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ZooError(f"{repo_id!r} is not the name of a repository; write org/repo.")
    reference = HubReference(repo_id, dataset=not network)
    if data is not None and not network:
        raise ZooError("data= is for a network; this is a profile or a registry.")
    head = read_head(reference)
    _check(head, network)
    listed = _listed(head)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        if folder is None:
            profile = _profile(what)
            title = f"Profile {profile.architecture} {profile.name}"
            for path in set(head.files) & {INDEX, *listed}:
                _fetch(head.reference.file(path), out)
            add_profile(profile, out)
            write_registry(out, out, str(reference), options.license or _licence_of(profile))
        elif network:
            title = f"Pruned network {folder.resolve().name}"
            write_repository(folder, out, str(reference), data, options)
        else:
            title = "Registry"
            own = OWN_LICENCE if folder.resolve() == registry_folder().resolve() else None
            write_registry(folder, out, str(reference), options.license or own)
        return commit_folder(
            out,
            head,
            options.message or title,
            private=private,
            obsolete=listed,
            dry_run=dry_run,
        )


def _folder(what: str | Path | Profile) -> Path | None:
    """The folder of a network or a registry; None for a profile.

    Raises:
        ZooError: for a folder of neither.
    """
    if isinstance(what, Profile) or (isinstance(what, str) and what.startswith(REFERENCES)):
        return None
    folder = registry_folder() if what == "bundled" else Path(what).expanduser()
    if not any((folder / name).is_file() for name in (RECORD, INDEX)):
        raise ZooError(
            f"{folder} is neither the folder of a pruned network ({RECORD} is missing) nor a "
            f"registry ({INDEX} is missing); a profile is written 'file:{folder}'."
        )
    return folder


def _profile(what: str | Path | Profile) -> Profile:
    return what if isinstance(what, Profile) else get_profile(str(what))


def _licence_of(profile: Profile) -> str | None:
    """Of a profile that others published, theirs; of one of the zoo's own registry, its."""
    if profile.published is not None:
        return profile.published.licence.lower()
    return OWN_LICENCE if profile.architecture in list_architectures() else None


def _check(head: Head, network: bool) -> None:
    """Refuse a repository that was not published by the zoo, or holds the other kind.

    Raises:
        ZooError: naming what is there.
    """
    mark = RECORD if network else INDEX
    others = sorted(set(head.files) - {".gitattributes"})
    if not others or (others == [README] and _is_empty(head.reference.file(README))):
        return
    theirs = f"{head.reference} is somebody else's, or of another kind: it holds"
    if mark not in others:
        raise ZooError(f"{theirs} {others[0]} and no {mark}. Name another repository.")
    try:
        path, _ = download(head.reference.file(mark))
        if network:
            PruningRecord.read(path)
        else:
            read_entries(path.parent)
    except DocumentError:
        raise ZooError(f"{theirs} {mark} of another library. Name another repository.") from None


def _is_empty(reference: HubReference) -> bool:
    """Whether a card has front matter alone, as the Hub writes it for a new repository."""
    path, _ = download(reference)
    return not card_parts(read_text(path))[1]


def _listed(head: Head) -> tuple[str, ...]:
    """The files that an earlier publication wrote; none where their list cannot be read."""
    if CHECKSUMS not in head.files:
        return ()
    path, _ = download(head.reference.file(CHECKSUMS))
    with suppress(DocumentError):
        return tuple(read_checksums(path.parent) or ())
    return ()


def _fetch(reference: HubReference, out: Path) -> None:
    """Copy a file of the Hub to its place in the folder `out`."""
    path, _ = download(reference)
    target = out / str(reference.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
