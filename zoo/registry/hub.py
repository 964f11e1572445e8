"""Reading from the Hugging Face Hub; only this module and `hub_commits` import its client.

The client checks the length of what arrives, not its content, so every file is hashed here. A
reference is pinned to a commit with the first file; whatever else is needed comes from there.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from zoo.common.digests import sha256_of
from zoo.errors import ZooError, first_line

__all__ = [
    "HubReference",
    "card_parts",
    "card_text",
    "checked_path",
    "content_id",
    "download",
    "files_of",
    "is_refusal",
    "is_safe_path",
    "reaching",
]

PREFIX = "hf:"

TIMEOUT = 10.0
"""Seconds that the Hub has to say what a repository holds."""

T = TypeVar("T")

_FORM = re.compile(
    r"(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@\s]*[^@\s/]))?"
    r"(?:@(?P<revision>[^@\s]+))?"
)


@dataclass(frozen=True)
class HubReference:
    """`hf:[datasets/]<org>/<repo>[/<path>][@<revision>]`; what is absent is None.

    Attributes:
        repo: `<org>/<repo>`.
        path: of a file in it.
        revision: branch, tag or commit; None for the head of the main branch.
        dataset: whether it is a repository of the Hub's data sets, as a registry's is.
    """

    repo: str
    path: str | None = None
    revision: str | None = None
    dataset: bool = False

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """The reference in `text`, with or without its `hf:`.

        Raises:
            ZooError: for another form, or a path that leaves the repository.
        """
        match = _FORM.fullmatch(text.removeprefix(PREFIX))
        if (
            match is None
            or ".." in (match["revision"] or "")
            or (match["path"] is not None and not is_safe_path(match["path"]))
        ):
            raise ZooError(
                f"{text!r} is not a Hub reference; write "
                "hf:[datasets/]org/repo[/path/to/file][@revision], "
                "for example hf:timm/resnet18.a1_in1k/model.safetensors@main."
            )
        return cls(match["repo"], match["path"], match["revision"], match["kind"] is not None)

    def file(self, path: str) -> HubReference:
        """The reference to a file of the same repository, at the same revision."""
        return replace(self, path=path)

    def alone(self) -> HubReference:
        """The reference itself, of a whole repository.

        Raises:
            ZooError: if it names a file.
        """
        if self.path is not None:
            raise ZooError(f"{self} names a file: write the repository alone.")
        return self

    @property
    def kind(self) -> str:
        """`model` or `dataset`, as the Hub's client says it."""
        return "dataset" if self.dataset else "model"

    @property
    def place(self) -> str:
        """The repository in words."""
        at = f" at revision {self.revision!r}" if self.revision else ""
        return f"the {self.kind} repository {self.repo!r}{at}"

    def __str__(self) -> str:
        path, at = f"/{self.path}" * bool(self.path), f"@{self.revision}" * bool(self.revision)
        return f"{PREFIX}{'datasets/' * self.dataset}{self.repo}{path}{at}"


def download(reference: HubReference) -> tuple[Path, HubReference]:
    """The local, cached copy of one file, and its reference pinned to the commit that it is of.

    Where the Hub does not answer, the copy that was cached last is taken.

    Raises:
        ZooError: if the repository, revision or file does not exist, is not open to this user, or
            the Hub cannot be reached and the file is not in the cache; if the file arrives damaged
            twice, after which it is no longer in the cache.
    """
    path = _cached_or_sent(reference)
    if not _is_whole(path):
        _forget(path)
        path = _cached_or_sent(reference)
        if not _is_whole(path):
            _forget(path)
            raise ZooError(
                f"{reference} arrived damaged twice: its content is not what the Hub announced. "
                "Nothing of it was kept."
            )
    return path, _pinned(reference, path)


def files_of(reference: HubReference) -> tuple[tuple[str, ...], HubReference]:
    """The paths of all files of a repository, sorted, and its reference pinned to their commit.

    Where the Hub does not answer, these are the files in the cache.

    Raises:
        ZooError: as `download` does.
    """
    whole = replace(reference, path=None)

    def asked() -> tuple[tuple[str, ...], HubReference]:
        from huggingface_hub import HfApi

        info: Any = HfApi().repo_info(
            whole.repo, revision=whole.revision, repo_type=whole.kind, timeout=TIMEOUT
        )
        names = sorted(checked_path(sibling.rfilename) for sibling in info.siblings or ())
        return tuple(names), replace(whole, revision=info.sha)

    def cached() -> tuple[tuple[str, ...], HubReference]:
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                whole.repo, revision=whole.revision, repo_type=whole.kind, local_files_only=True
            )
        )
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                       if path.is_file())  # fmt: skip
        return tuple(names), replace(whole, revision=folder.name)

    with reaching(f"get the file list of {whole.place}"):
        return _or_cached(asked, cached)


def checked_path(path: str) -> str:
    """The path of a file in a repository, as the Hub says it.

    Raises:
        ZooError: for one that would leave the folder that the repository is copied to.
    """
    if not is_safe_path(path):
        raise ZooError(f"The Hub names a file {path!r}, which no folder can hold safely.")
    return path


def is_safe_path(path: str) -> bool:
    """Whether a path of a repository's file stays in the folder that it is joined to, anywhere."""
    unsafe = re.search(r"[\\:\x00-\x1f\x7f\x85\u2028\u2029]", path)
    return not unsafe and not {"", ".", ".."} & set(path.split("/"))


def card_text(metadata: Mapping[str, Any], results: Sequence[Mapping[str, Any]], body: str) -> str:
    """A model card: front matter as the Hub reads it, then `body`.

    Args:
        metadata: arguments of `huggingface_hub.ModelCardData`.
        results: arguments of one `huggingface_hub.EvalResult` each.
        body: Markdown.
    """
    from huggingface_hub import EvalResult, ModelCardData

    found = [EvalResult(**result) for result in results]
    data = ModelCardData(**metadata, eval_results=found or None)
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def card_parts(text: str) -> tuple[dict[str, Any], str]:
    """(front matter as data, body) of a model card."""
    from huggingface_hub import RepoCard

    card = RepoCard(text, ignore_metadata_errors=True)
    return dict(card.data.to_dict()), card.text.strip()


def _cached_or_sent(reference: HubReference) -> Path:
    def fetch(*, local: bool) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                reference.repo,
                reference.path or "",
                revision=reference.revision,
                repo_type=reference.kind,
                local_files_only=local,
            )
        )

    with reaching(f"get {reference.path!r} of {reference.place}"):
        return _or_cached(lambda: fetch(local=False), lambda: fetch(local=True))


def _or_cached(ask: Callable[[], T], cached: Callable[[], T]) -> T:
    """What the Hub answers, or where it does not answer what is in the cache."""
    try:
        return ask()
    except Exception as error:  # the client's errors share no base class
        if is_refusal(error):
            raise
        try:
            found = cached()
        except Exception:
            raise error from None
        logging.getLogger("zoo").warning("The Hub did not answer; what is in the cache was taken.")
        return found


def is_refusal(error: Exception) -> bool:
    """Whether the Hub answered, and there is nothing to be had."""
    from huggingface_hub import errors

    return isinstance(
        error,
        errors.RepositoryNotFoundError
        | errors.RevisionNotFoundError
        | errors.RemoteEntryNotFoundError
        | errors.HFValidationError,
    )


def _pinned(reference: HubReference, path: Path) -> HubReference:
    """The reference at the commit whose folder `path` lies in: `snapshots/<commit>/<file>`."""
    folder = path.parents[(reference.path or "").count("/")]
    commit = folder.name if folder.parent.name == "snapshots" else reference.revision
    return replace(reference, revision=commit)


def content_id(path: Path, digits: int) -> str:
    """The id of a file's content as the Hub gives it: 64 digits of sha256 for one that it stores as
    a large file, 40 of git's sha1 for another."""
    if digits == 64:
        return sha256_of(path)
    with path.open("rb") as stream:
        found = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        for part in iter(lambda: stream.read(1 << 20), b""):
            found.update(part)
        return found.hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether a file is what its name in the cache says; true where the cache has no links."""
    if not path.is_symlink():
        return True
    blob = path.resolve()
    known = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name)
    return bool(known) and content_id(path, len(blob.name)) == blob.name


def _forget(path: Path) -> None:
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Turn every error of the Hub client in the block into a `ZooError`: "Cannot <what>: ..."."""
    try:
        yield
    except ZooError:
        raise
    except Exception as error:  # the Hub client's errors share no base class
        raise ZooError(f"Cannot {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "access to it must be requested on its page, then `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one (log in with `hf auth login`)."
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "no such file in the repository."
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return (
            "the Hub cannot be reached, and it is not in the local cache. Check the network "
            "connection, HF_ENDPOINT and HF_HUB_OFFLINE."
        )
    if status in (401, 403):
        return "this is not allowed without a token that permits it: `hf auth login`."
    if status is not None and status >= 500:
        return f"the Hub has an error of its own (HTTP {status}). Try again later."
    if status == 429:
        return "the Hub takes no more requests from here for now; wait, or log in."
    reason = first_line(error.__cause__ or error).rstrip(".")
    return f"{reason}. Check the name and the network connection."
