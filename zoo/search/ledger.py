"""The table of every profile evaluation: JSON lines, one flushed row per evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zoo.documents import SCHEMA_VERSION, decode, encode
from zoo.errors import DocumentError

__all__ = ["Key", "Ledger", "Row"]


@dataclass(frozen=True)
class Key:
    """What an accuracy was measured of, and how: two equal keys give the same accuracy.

    Attributes:
        network: sha256 of the base network's checkpoint, or its name where there is none.
        split: digest of the validation split.
        classes, image_size: of the task.
        widths: channels kept, per group in order.
        criterion, seed: what chose the channels.
        fidelity: how it was measured, settings included.
    """

    network: str
    split: str
    classes: int
    image_size: int
    widths: tuple[int, ...]
    criterion: str
    seed: int
    fidelity: str


@dataclass(frozen=True)
class Row:
    """One evaluation: validation accuracy in [0, 1], and the seconds it took."""

    key: Key
    accuracy: float
    seconds: float


class Ledger:
    """The rows of one file, by key; a file that exists is read back, so that reruns replay it.

    A last line without its newline, left by a run that was killed, is dropped from the file.

    Args:
        path: the JSON lines file; None keeps the rows in memory alone.

    Raises:
        DocumentError: for a row that is malformed or has another schema version.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._rows: dict[Key, Row] = {}
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def get(self, key: Key) -> Row | None:
        """The row of `key`, or None."""
        return self._rows.get(key)

    def add(self, row: Row) -> None:
        """Keep `row`, and append it to the file at once."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"schema_version": SCHEMA_VERSION, **encode(row)})
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        self._rows[row.key] = row

    def _read(self, path: Path) -> None:
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(path, len(whole) + 1 if whole else 0)
        for number, line in enumerate(whole.splitlines(), start=1):
            where = f"{path}, line {number}"
            try:
                raw = json.loads(line)
            except ValueError:
                raise DocumentError(f"{where}: not valid JSON; move the file away.") from None
            if not isinstance(raw, dict) or raw.pop("schema_version", None) != SCHEMA_VERSION:
                raise DocumentError(
                    f"{where}: not a row of schema_version {SCHEMA_VERSION}, the one that this "
                    f"version reads; move the file away or name another folder."
                )
            row = decode(Row, raw, where)
            self._rows[row.key] = row
