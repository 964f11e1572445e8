"""Writing to the Hugging Face Hub: a folder becomes one commit on what was read before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from zoo.errors import ZooError
from zoo.registry.hub import (
    TIMEOUT,
    HubReference,
    checked_path,
    content_id,
    is_refusal,
    reaching,
)

__all__ = [
    "FoundRepository",
    "Head",
    "Published",
    "commit_folder",
    "read_head",
    "repositories_with",
]

T = TypeVar("T")

ATTEMPTS = 5
"""How often a commit is tried when connections drop."""


@dataclass(frozen=True)
class Published:
    """What a commit sent, or would send.

    Attributes:
        reference: of the repository, pinned to its commit; of its head before a dry run.
        sent: path -> size in bytes, of the files that are new or changed.
        deleted: paths of files that are no longer part of what was published.
        unchanged: paths of files that the repository held already.
        dry_run: whether nothing was sent.
        private: whether only its owner sees the repository.
    """

    reference: HubReference
    sent: dict[str, int]
    deleted: tuple[str, ...]
    unchanged: tuple[str, ...]
    dry_run: bool
    private: bool

    @property
    def url(self) -> str:
        """The repository's page."""
        from huggingface_hub import constants

        kind = "datasets/" * self.reference.dataset
        return f"{constants.ENDPOINT}/{kind}{self.reference.repo}"


@dataclass(frozen=True)
class FoundRepository:
    """A repository that a search of the Hub found."""

    reference: str
    tags: tuple[str, ...]
    downloads: int


@dataclass(frozen=True)
class _File:
    """The size of a file, and its ids: sha256 as a large file, git's sha1 as another."""

    size: int
    ids: frozenset[str]


@dataclass(frozen=True)
class Head:
    """What a repository holds: what a commit is made on.

    Attributes:
        reference: of the repository, pinned to its newest commit; not pinned if it does not exist.
        files: path -> file.
        private: whether only its owner sees it; None if it does not exist.
    """

    reference: HubReference
    files: dict[str, _File]
    private: bool | None = None


def read_head(reference: HubReference) -> Head:
    """The head of a repository's main branch.

    Raises:
        ZooError: if the Hub cannot be reached, or does not let this user read it.
    """
    with reaching(f"read {reference.place}"):
        return _persist(lambda: _head(reference))


def commit_folder(
    folder: Path,
    head: Head,
    message: str,
    *,
    private: bool,
    obsolete: Collection[str] = (),
    dry_run: bool = False,
) -> Published:
    """Add the files in `folder` to a repository in one commit; none if it has them already.

    The repository is created if there is none. If somebody else committed after `head`, nothing is
    changed. Dropped connections are tried again, and what has arrived is not sent twice.

    Args:
        folder: whose files are sent, with those in its subfolders.
        head: what the repository was when it was read.
        message: of the commit.
        private: of a new repository; an existing one stays as it is.
        obsolete: paths in the repository that are deleted where `folder` lacks them.
        dry_run: send nothing.

    Raises:
        ZooError: if the repository cannot be written, or was changed meanwhile.
    """
    files, there = _files(folder), head.files
    sent = {path: file.size for path, file in files.items() if not _holds(there, path, file)}
    deleted = tuple(sorted(set(obsolete) & set(there) - set(files)))
    unchanged = tuple(sorted(set(files) - set(sent)))
    if not dry_run and (sent or deleted):
        with reaching(f"publish to {replace(head.reference, revision=None).place}"):
            if head.reference.revision is None:
                head = _persist(lambda: _created(head.reference, private))
            head = _commit(folder, head, message, {path: files[path] for path in sent}, deleted)
    seen = private if head.private is None else head.private
    return Published(head.reference, sent, deleted, unchanged, dry_run, seen)


def repositories_with(tag: str) -> list[FoundRepository]:
    """The models and data sets of the Hub that have a tag, most downloaded first.

    Raises:
        ZooError: if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api, found = HfApi(), list[FoundRepository]()
    with reaching("list the repositories of the Hub"):
        for dataset, listed in ((False, api.list_models), (True, api.list_datasets)):
            for info in listed(filter=tag, limit=1000):
                reference = HubReference(info.id, dataset=dataset)
                tags = tuple(info.tags or ())
                found.append(FoundRepository(str(reference), tags, info.downloads or 0))
    return sorted(found, key=lambda each: (-each.downloads, each.reference))


def _head(reference: HubReference) -> Head:
    from huggingface_hub import HfApi, errors
    from huggingface_hub.hf_api import RepoFile

    api, kind = HfApi(), reference.kind
    reference = replace(reference, path=None, revision=None)
    try:
        info: Any = api.repo_info(reference.repo, repo_type=kind, timeout=TIMEOUT)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        return Head(reference, {})
    tree = api.list_repo_tree(reference.repo, recursive=True, revision=info.sha, repo_type=kind)
    files = {
        checked_path(entry.path): _File(
            entry.size,
            frozenset({entry.blob_id} | ({entry.lfs.sha256} if entry.lfs else set())),
        )
        for entry in tree
        if isinstance(entry, RepoFile)
    }
    return Head(replace(reference, revision=info.sha), files, bool(info.private))


def _created(reference: HubReference, private: bool) -> Head:
    from huggingface_hub import HfApi

    api, kind = HfApi(), reference.kind
    api.create_repo(reference.repo, repo_type=kind, private=private, exist_ok=True)
    head = _head(reference)
    if set(head.files) - {".gitattributes"}:
        raise _moved(reference)
    return head


def _commit(
    folder: Path,
    head: Head,
    message: str,
    sent: Mapping[str, _File],
    deleted: Sequence[str],
) -> Head:
    """The head that a commit on `head` makes."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    reference = head.reference

    def attempt() -> Head:
        now = _head(reference)
        if now.reference != reference:  # by an attempt whose answer was lost, or by somebody else
            arrived = all(_holds(now.files, path, file) for path, file in sent.items())
            if arrived and not set(deleted) & set(now.files):
                return now
            raise _moved(reference)
        made = HfApi().create_commit(
            reference.repo,
            [
                *(CommitOperationAdd(path, folder / path) for path in sent),
                *(CommitOperationDelete(path) for path in deleted),
            ],
            commit_message=message,
            repo_type=reference.kind,
            parent_commit=reference.revision,
        )
        return replace(head, reference=replace(reference, revision=str(made.oid)))

    try:
        return _persist(attempt)
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (409, 412):
            raise _moved(reference) from error
        raise


def _moved(reference: HubReference) -> ZooError:
    return ZooError(
        f"{replace(reference, revision=None)} was changed by somebody else meanwhile; nothing was "
        "overwritten. Look at what is there, and publish again."
    )


def _holds(files: Mapping[str, _File], path: str, file: _File) -> bool:
    return path in files and bool(files[path].ids & file.ids)


def _persist(action: Callable[[], T]) -> T:
    """The result of `action`, tried again where a connection drops or the Hub is at fault."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:  # the client's errors share no base class
            if attempt == ATTEMPTS - 1 or not _may_pass(error):
                raise
            time.sleep(2**attempt)
    raise AssertionError  # unreachable: the last attempt returns or raises


def _may_pass(error: Exception) -> bool:
    """Whether an error may be gone at another try."""
    from huggingface_hub import errors

    ours = ZooError | ValueError | LookupError | TypeError | AttributeError | FileNotFoundError
    if isinstance(error, ours | errors.OfflineModeIsEnabled) or is_refusal(error):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status in (408, 429) or status >= 500


def _files(folder: Path) -> dict[str, _File]:
    return {
        path.relative_to(folder).as_posix(): _File(
            path.stat().st_size, frozenset(content_id(path, digits) for digits in (40, 64))
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
