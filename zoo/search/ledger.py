"""The ledger: a table of all evaluations.

A run's ledger is a file of JSON lines, flushed after every row. `merge` writes several as parquet.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from zoo.common.documents import LARGEST, SCHEMA_VERSION, decode, encode, parse_json, replacing
from zoo.errors import DocumentError, ZooError, unknown

try:
    import fcntl
except ImportError:  # Windows has no flock: runs are not guarded there
    fcntl = None  # type: ignore[assignment]

__all__ = ["FILE", "TEST", "Key", "Ledger", "Row", "merge", "open_alone", "read", "write"]

FILE = "ledger.jsonl"
"""the name of a ledger in its run's folder"""

TEST = "test-"
"""How the `split` of a key begins whose accuracy is that of test images: no search has one."""


@dataclass(frozen=True)
class Key:
    """What was measured, and how: equal keys give the same accuracy.

    Attributes:
        network: sha256 of the base network's checkpoint, or its name where there is none.
        split: digest of the training images and of those that were measured on, which are the
            validation images, or test images behind `TEST`.
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
    """One evaluation: accuracy in [0, 1], and the seconds it took.

    `source` is the agent or policy that asked for it first, such as "ppo" or "equal".
    """

    key: Key
    accuracy: float
    seconds: float
    source: str | None = None


class Ledger:
    """The rows of one run's file, by key; an existing file is read back, so reruns replay it.

    Until `close`, or until this process ends or is killed, no other process can write the file;
    `read` works meanwhile. A last line without its newline, left by a killed run, is removed.

    Args:
        path: the JSON lines file; None keeps the rows in memory alone.
        known: rows of other runs; those that are asked for are copied into this ledger.

    Raises:
        ZooError: if another process, or another `Ledger` of this one, is writing the file.
        DocumentError: for a row that is malformed or has another schema version.
    """

    def __init__(self, path: Path | None = None, known: Iterable[Row] = ()) -> None:
        self.path = path
        self._known = {row.key: row for row in known}
        self._rows: dict[Key, Row] = {}
        self._stream: BinaryIO | None = None
        if path is not None:
            self._stream = open_alone(path)
            try:
                self._rows = {row.key: row for row in _read_lines(path)}
                _drop_torn_line(path)
            except BaseException:
                self.close()
                raise
            _OPEN.add(self)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def get(self, key: Key) -> Row | None:
        """The row of `key`, or None."""
        if key not in self._rows and key in self._known:
            self.add(self._known[key])
        return self._rows.get(key)

    def add(self, row: Row) -> None:
        """Keep `row`, and append it to the file at once."""
        if self._stream is not None:
            line = json.dumps({"schema_version": SCHEMA_VERSION, **encode(row)})
            self._stream.write(line.encode() + b"\n")
            self._stream.flush()
        self._rows[row.key] = row

    def close(self) -> None:
        """Let others write the file; the rows can still be read here."""
        if self._stream is not None:
            self._stream.close()


_OPEN: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _close_inherited() -> None:
    """Close all ledgers in a forked worker: it would keep the lock after its parent was killed."""
    for ledger in list(_OPEN):
        ledger.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def open_alone(path: Path) -> BinaryIO:
    """The file at `path`, opened to append and locked for this process.

    Raises:
        ZooError: if it is locked already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("ab")
    if fcntl is not None:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise ZooError(
                f"{path} is being written by another run: wait for its end, or name another folder."
            ) from None
    return stream


def _drop_torn_line(path: Path) -> None:
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(path, len(whole) + len(newline))


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of several ledgers; of rows with equal keys, the first.

    Nothing is locked or changed. A ledger that is still being written gives its rows so far.

    Args:
        paths: JSON lines (.jsonl), merged ledgers (.parquet) or folders of runs, in any mix.

    Raises:
        DocumentError: for a file that is missing, malformed, of another schema version or suffix.
        ZooError: for a merged ledger, if pyarrow is not installed.
    """
    return _first_of_each(row for path in paths for row in _read_file(path))


def merge(paths: Iterable[Path], target: Path) -> int:
    """Write the rows of `paths` to one parquet file, atomically, and return their number.

    Raises:
        DocumentError, ZooError: as `read`.
    """
    return write(read(paths), target)


def write(rows: Iterable[Row], target: Path) -> int:
    """Write rows to one parquet file, atomically, and return their number.

    The same rows give the same bytes, whatever their order; of rows with equal keys the first is
    written.

    Raises:
        ZooError: if pyarrow is not installed.
    """
    flat = [
        {**encode(row.key), "accuracy": row.accuracy, "seconds": row.seconds, "source": row.source}
        for row in _first_of_each(rows)
    ]
    flat.sort(key=lambda row: tuple(map(str, row.values())))
    pyarrow, parquet = _pyarrow()
    table = pyarrow.Table.from_pylist(flat)
    with replacing(target) as partial:
        parquet.write_table(
            table.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)}), partial
        )
    return len(flat)


def _first_of_each(rows: Iterable[Row]) -> list[Row]:
    """The rows, without those whose key an earlier one has."""
    found: dict[Key, Row] = {}
    for row in rows:
        found.setdefault(row.key, row)
    return list(found.values())


def _read_file(path: Path) -> list[Row]:
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise DocumentError(f"{file} does not exist.")
    if file.suffix not in _READERS:
        raise unknown(f"suffix of {file.name}:", file.suffix, _READERS, DocumentError)
    return _READERS[file.suffix](file)


def _read_lines(path: Path) -> list[Row]:
    rows = []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        where = f"{path}, line {number}"
        raw = parse_json(line, where)
        if not isinstance(raw, dict) or raw.pop("schema_version", None) != SCHEMA_VERSION:
            raise DocumentError(
                f"{where}: not a row of schema_version {SCHEMA_VERSION}, the one that this "
                f"version reads; move the file away or name another folder."
            )
        rows.append(decode(Row, raw, where))
    return rows


def _read_parquet(path: Path) -> list[Row]:
    pyarrow, parquet = _pyarrow()
    try:
        file = parquet.ParquetFile(path)
        parts = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        if (claimed := sum(part.total_byte_size for part in parts)) > LARGEST:
            raise DocumentError(f"{path} claims {claimed:,} bytes of rows: it is no ledger.")
        stamp = (file.metadata.metadata or {}).get(b"schema_version", b"none")
        if (version := stamp.decode(errors="replace")) != str(SCHEMA_VERSION):
            raise DocumentError(f"{path}: schema_version is {version}, not {SCHEMA_VERSION}.")
        found = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DocumentError(f"{path} is not a parquet file: {error}") from None
    rows = []
    for raw in found:
        own = {name: raw.pop(name, None) for name in ("accuracy", "seconds", "source")}
        rows.append(decode(Row, {"key": raw, **own}, str(path)))
    return rows


_READERS = {".jsonl": _read_lines, ".parquet": _read_parquet}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ZooError("Merged ledgers need pyarrow: pip install 'prunezoo[search]'.") from None
    return pyarrow, pyarrow.parquet
