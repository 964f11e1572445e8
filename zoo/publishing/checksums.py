"""SHA256SUMS: the sha256 of every file of a folder, as `sha256sum --check` reads it."""

from __future__ import annotations

import re
from pathlib import Path

from zoo.common.digests import sha256_of
from zoo.common.documents import read_text, write_text
from zoo.errors import DocumentError

__all__ = ["CHECKSUMS", "files_in", "read_checksums", "write_checksums"]

CHECKSUMS = "SHA256SUMS"

HUBS = (".gitattributes", ".cache", ".git")
"""What the Hub and its client put into a folder."""

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def files_in(folder: Path) -> list[str]:
    """The paths of the files in a folder and its subfolders, sorted, without the Hub's own."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.parts[0] not in HUBS)


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS of all files in `folder`."""
    names = [name for name in files_in(folder) if name != CHECKSUMS]
    lines = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names)
    write_text(folder / CHECKSUMS, lines)


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Path -> sha256, as SHA256SUMS of `folder` has it; None where there is no such file.

    Raises:
        DocumentError: for a line of another form, or a path that leaves the folder.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    found = {}
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        match = _LINE.fullmatch(line)
        name = Path(match[2]) if match else Path("..")
        if match is None or name.is_absolute() or ".." in name.parts:
            raise DocumentError(f"{path}:{number} is not a sha256 and the path of a file.")
        found[match[2]] = match[1]
    return found
