"""The Hugging Face Hub: the only module that imports `huggingface_hub`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.errors import ZooError

__all__ = ["download", "list_files", "parse_hub_reference"]

_REFERENCE = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@\s]*[^@\s/]))?(?:@(?P<revision>[^@\s]+))?"
)


def parse_hub_reference(reference: str) -> tuple[str, str | None, str | None]:
    """(repo_id, path, revision) of "org/repo[/path/to/file][@revision]"; absent parts are None.

    Raises:
        ZooError: if `reference` is not of that form.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ZooError(
            f"{reference!r} is not a Hub reference; write org/repo[/path/to/file][@revision], "
            "for example timm/resnet18.a1_in1k/model.safetensors@main."
        )
    return match["repo"], match["path"], match["revision"]


def download(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """The local, cached copy of one file of a Hub repository.

    Raises:
        ZooError: if the repository, revision or file does not exist, is not open to this user, or
            the Hub cannot be reached and the file is not in the cache.
    """
    with _reaching(f"{filename!r} of the repository", repo_id, revision):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo_id, filename, revision=revision))


def list_files(repo_id: str, revision: str | None = None) -> list[str]:
    """The paths of all files of a Hub repository, sorted.

    Raises:
        ZooError: as `download` does.
    """
    with _reaching("the file list of the repository", repo_id, revision):
        from huggingface_hub import HfApi

        return sorted(HfApi().list_repo_files(repo_id, revision=revision))


@contextmanager
def _reaching(what: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn every error of the Hub client in the block into a `ZooError`."""
    try:
        yield
    except Exception as error:  # the Hub client's errors share no base class
        place = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
        raise ZooError(f"Cannot get {what} {place} from the Hub: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access to it must be requested on its page, then `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one (log in with `hf auth login`)."
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hub cannot be reached, and the file is not in the local cache."
    if isinstance(error, errors.EntryNotFoundError):
        return "no such file in the repository."
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].rstrip('.')}. Check the name and the network connection."
