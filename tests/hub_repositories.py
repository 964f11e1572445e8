"""What a loopback Hub keeps: repositories whose commits hold blobs, and what is said about them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import yaml

__all__ = ["ATTRIBUTES", "Blob", "Commit", "Repository", "goes_to_lfs"]

LARGE = ("bin", "h5", "npy", "npz", "onnx", "parquet", "pkl", "pt", "pth", "safetensors", "zip")
ATTRIBUTES = "".join(f"*.{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LARGE).encode()
SHORT = ("createdAt", "downloads", "library_name", "likes", "pipeline_tag", "private", "tags")
FRONT_MATTER = re.compile(rb"---\r?\n(.*?)\r?\n---\s", re.DOTALL)


def goes_to_lfs(path: str, sample: bytes, size: int) -> bool:
    """Whether the Hub wants a file in its large storage: by its suffix, if binary or over 10 MB."""
    return size > 10_000_000 or b"\0" in sample or path.rpartition(".")[2] in LARGE


def git_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether git holds it or only a pointer to it."""

    content: bytes
    lfs: bool

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        spec = "https://git-lfs.github.com/spec/v1"
        return f"version {spec}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def git_id(self) -> str:
        return git_id("blob", self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        """SHA-256 of what lies in the large storage, else git's id: the name in client caches."""
        return self.sha256 if self.lfs else self.git_id

    def large(self, key: str) -> dict[str, Any]:
        """The `lfs` entry of a listing, which names the SHA-256 by `key`; nothing for git's own."""
        if not self.lfs:
            return {}
        return {"lfs": {key: self.sha256, "size": self.size, "pointerSize": len(self.pointer)}}


@dataclass(frozen=True)
class Commit:
    id: str
    files: dict[str, Blob]
    title: str
    message: str
    date: str


@dataclass
class Repository:
    """A model or a data set: commits of branch main, oldest first, and git tags by name."""

    id: str
    kind: str = "model"
    private: bool = False
    gated: bool = False
    labels: tuple[str, ...] = ()
    commits: list[Commit] = field(default_factory=list)
    git_tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add({".gitattributes": Blob(ATTRIBUTES, False)}, "initial commit")

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def add(self, files: dict[str, Blob], title: str, message: str = "") -> Commit:
        """A new commit of exactly `files` on main, also where nothing differs."""
        parent = self.head.id if self.commits else f"{self.kind} {self.id}"
        tree = "".join(f"{path} {files[path].git_id}\n" for path in sorted(files))
        moment = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=len(self.commits))
        date = moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")
        name = git_id("commit", f"{parent}\n{tree}\n{title}\n{message}".encode())
        self.commits.append(Commit(name, dict(sorted(files.items())), title, message, date))
        return self.head

    def at(self, revision: str) -> Commit | None:
        """The commit of main, of a tag or of an id's first digits; None if there is none."""
        if revision == "main":
            return self.head
        wanted = self.git_tags.get(revision, revision)
        found = [commit for commit in self.commits if commit.id.startswith(wanted)]
        return found[0] if len(wanted) >= 5 and len(found) == 1 else None

    @property
    def card(self) -> dict[str, Any]:
        """What the head of README.md says, in YAML."""
        readme = self.head.files.get("README.md")
        match = FRONT_MATTER.match(readme.content) if readme else None
        return (yaml.safe_load(match[1]) or {}) if match else {}

    @property
    def tags(self) -> list[str]:
        """Labels given at creation and those the Hub derives from the card."""
        card = self.card
        named = [card[key] for key in ("library_name", "pipeline_tag") if key in card]
        for key in ("license", "dataset", "base_model"):
            values = card.get(key, card.get(f"{key}s", []))
            named += [f"{key}:{v}" for v in ([values] if isinstance(values, str) else values)]
        return list(dict.fromkeys([*self.labels, *card.get("tags", []), *named]))

    def summary(
        self, commit: Commit, *, full: bool, expand: list[str], sizes: bool = False
    ) -> dict[str, Any]:
        """The repository as the API lists it; `sha` and files only come in full or if asked for."""
        fields = {
            "author": self.id.partition("/")[0],
            "cardData": self.card,
            "createdAt": self.commits[0].date,
            "disabled": False,
            "downloads": 0,
            "gated": "manual" if self.gated else False,
            "lastModified": self.head.date,
            "library_name": self.card.get("library_name"),
            "likes": 0,
            "pipeline_tag": self.card.get("pipeline_tag"),
            "private": self.private,
            "sha": commit.id,
            "siblings": [
                {"rfilename": path}
                | ({"size": b.size, "blobId": b.git_id, **b.large("sha256")} if sizes else {})
                for path, b in commit.files.items()
            ],
            "tags": self.tags,
        }
        chosen = expand or (fields if full else SHORT)
        return {"_id": self.head.id[:24], "id": self.id} | {k: fields.get(k) for k in chosen}

    def tree(self, commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below `folder` ("" is the root), as the API lists them."""
        prefix = f"{folder}/" if folder else ""
        rows: dict[str, dict[str, Any]] = {}
        for path, blob in commit.files.items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                row = {"type": "directory", "oid": git_id("tree", name.encode()), "size": 0}
                rows.setdefault(name, row | {"path": name})
            if recursive or len(parts) == 1:
                row = {"type": "file", "oid": blob.git_id, "size": blob.size, "path": path}
                rows[path] = row | blob.large("oid")
        return list(rows.values())
