"""The table of every profile evaluation.

A run's ledger is JSON lines, one flushed row per evaluation; merging compacts several to parquet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.documents import SCHEMA_VERSION, decode, encode
from zoo.errors import DocumentError, ZooError

__all__ = ["Key", "Ledger", "Row", "merge", "read_parquet"]


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


def merge(ledgers: Iterable[Iterable[Row]], path: Path) -> int:
    """Write the rows of all `ledgers` to one parquet file, the last of equal keys; their count.

    Raises:
        ZooError: when the `search` extra is not installed.
    """
    rows = {row.key: row for ledger in ledgers for row in ledger}
    flat = [{**encode(r.key), "accuracy": r.accuracy, "seconds": r.seconds} for r in rows.values()]
    flat.sort(key=lambda row: tuple(map(str, row.values())))
    pyarrow, parquet = _pyarrow()
    table = pyarrow.Table.from_pylist(flat)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        parquet.write_table(
            table.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)}), temporary
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(flat)


def read_parquet(path: Path) -> list[Row]:
    """The rows of a merged ledger.

    Raises:
        DocumentError: for another schema version, or columns that are not a ledger's.
    """
    table = _pyarrow()[1].read_table(path)
    version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise DocumentError(f"{path}: schema_version is {version}, not {SCHEMA_VERSION}.")
    rows = []
    for raw in table.to_pylist():
        measured = {name: raw.pop(name, None) for name in ("accuracy", "seconds")}
        rows.append(decode(Row, {"key": raw, **measured}, str(path)))
    return rows


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ZooError("Merged ledgers need pyarrow: pip install 'prunezoo[search]'.") from None
    return pyarrow, pyarrow.parquet
