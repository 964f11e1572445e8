from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from zoo.common.documents import encode
from zoo.errors import DocumentError, ZooError
from zoo.search.ledger import FILE, Key, Ledger, Row, merge, read

KEY = Key("base", "split", 10, 16, (3, 5), "random", 7, "recalibration")
COMMITTED = sorted((Path(__file__).parents[2] / "registry" / "ledger").glob("*.parquet"))


def rows(count: int) -> list[Row]:
    return [
        Row(dataclasses.replace(KEY, seed=seed), 0.5 + seed / 100, 1.5, ("ppo", None)[seed % 2])
        for seed in range(count)
    ]


def write(path: Path, given: list[Row]) -> Path:
    with Ledger(path) as ledger:
        for row in given:
            ledger.add(row)
    return path


def test_a_reopened_ledger_has_every_row(tmp_path):
    path = write(tmp_path / "run" / "ledger.jsonl", rows(3))
    with Ledger(path) as again:
        assert list(again) == rows(3)
        assert again.get(rows(3)[1].key) == rows(3)[1]
        assert again.get(dataclasses.replace(KEY, fidelity="fine-tune")) is None


def test_each_row_can_be_read_before_the_next_while_the_file_is_held(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        for count, row in enumerate(rows(3), start=1):
            ledger.add(row)
            assert read([path]) == rows(count)


def test_reading_beside_a_writer_neither_needs_nor_ends_its_hold_nor_cuts_a_row_half_written(
    tmp_path,
):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.add(rows(1)[0])
        with path.open("ab") as stream:
            stream.write(b'{"schema_version": 1, "k')
        half = path.read_bytes()
        assert read([path]) == rows(1)
        assert path.read_bytes() == half
        with pytest.raises(ZooError, match="written by another run"):
            Ledger(path)


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path)
    first.add(rows(1)[0])
    with pytest.raises(ZooError, match=str(path)) as caught:
        Ledger(path)
    assert "name another folder" in str(caught.value)
    first.add(rows(2)[1])
    first.close()
    with Ledger(path) as second:
        assert list(second) == rows(2)
    with pytest.raises(ValueError, match="closed"):
        first.add(rows(3)[2])
    assert read([path]) == rows(2)


HOLDER = """
import os, sys, time
from pathlib import Path
from zoo.search.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
if sys.argv[2] == "none" or os.fork() == 0:
    print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("worker", ["none", "fork"])
def test_a_killed_process_leaves_its_file_to_the_next_even_with_a_worker_alive(tmp_path, worker):
    path = write(tmp_path / "ledger.jsonl", rows(2))
    command = [sys.executable, "-c", HOLDER, str(path), worker]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ZooError, match="another run"):
            Ledger(path)
        holder.kill()
        holder.wait()
        with Ledger(path) as ledger:
            assert list(ledger) == rows(2)
        if worker == "fork":
            os.killpg(holder.pid, 0)  # the orphan was alive all the while
    finally:
        holder.stdout.close()
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()


def test_a_ledger_that_cannot_be_read_is_not_held(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text("not json\n")
    with pytest.raises(DocumentError) as error:  # its frames keep the refused ledger alive
        Ledger(path)
    path.write_text("")
    with Ledger(path) as ledger:
        assert len(ledger) == 0, error


@pytest.mark.parametrize("line", ["[" * 200_000, '{"accuracy": NaN}', '{"accuracy": 1e999}'])
def test_a_line_that_is_no_document_is_one_error(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(DocumentError, match="line 1 is not a document"):
        read([path])


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path, cut):
    path = write(tmp_path / "ledger.jsonl", rows(2))
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    path.write_bytes(whole[: max(first_line + 1, len(whole) - cut)])
    assert read([path]) == rows(1)
    with Ledger(path) as torn:
        assert list(torn) == rows(1)
        torn.add(rows(3)[2])
    assert read([path]) == [rows(3)[0], rows(3)[2]]


def test_a_file_with_only_a_torn_line_is_empty(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"schema_version": 1, "key"')
    with Ledger(path) as ledger:
        assert len(ledger) == 0
    assert path.read_bytes() == b""


def test_another_schema_version_is_refused_and_left_alone(tmp_path):
    path = write(tmp_path / "ledger.jsonl", rows(1))
    text = json.dumps({**json.loads(path.read_text()), "schema_version": 99}) + "\n"
    path.write_text(text + "torn")
    with pytest.raises(DocumentError, match="schema_version"):
        Ledger(path)
    assert path.read_text() == text + "torn"


def test_a_malformed_row_names_its_line(tmp_path):
    path = write(tmp_path / "ledger.jsonl", rows(1))
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(DocumentError, match="line 2"):
        Ledger(path)
    path.write_text(path.read_text().replace("not json\n", '{"schema_version": 1, "kee": 1}\n'))
    with pytest.raises(DocumentError, match="kee"):
        read([path])


def test_rows_written_before_there_was_a_source_are_read(tmp_path):
    path = write(tmp_path / "ledger.jsonl", rows(2))
    old = [json.loads(line) for line in path.read_text().splitlines()]
    for row in old:
        row.pop("source", None)
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert read([path]) == [dataclasses.replace(row, source=None) for row in rows(2)]


def test_the_committed_ledgers_are_read_and_survive_another_merge(tmp_path):
    assert COMMITTED
    for path in COMMITTED:
        committed = read([path])
        assert len({row.key for row in committed}) == len(committed) > 100
        assert all(0 <= row.accuracy <= 1 for row in committed)
        assert merge([path], tmp_path / path.name) == len(committed)
        assert set(read([tmp_path / path.name])) == set(committed)


def test_merged_ledgers_hold_every_row_once_and_the_first_of_two(tmp_path):
    one = write(tmp_path / "one.jsonl", rows(4))
    again = [dataclasses.replace(row, accuracy=0.9) for row in rows(6)[2:]]
    two = write(tmp_path / "two" / FILE, again)
    expected = rows(4) + again[2:]
    path = tmp_path / "merged" / "all.parquet"
    assert merge([one, two.parent], path) == 6
    assert sorted(read([path]), key=lambda row: row.key.seed) == expected
    first = path.read_bytes()
    assert merge([path, one, two], path) == 6
    assert path.read_bytes() == first
    assert merge([two, one], path) == 6
    assert sorted(read([path]), key=lambda row: row.key.seed) == rows(2) + again
    assert list(path.parent.iterdir()) == [path]


def test_a_mix_of_files_is_read_as_one_with_its_sources(tmp_path):
    lines = write(tmp_path / "run" / FILE, rows(4)[2:])
    table = tmp_path / "merged.parquet"
    merge([write(tmp_path / "other.jsonl", rows(3))], table)
    assert read([table, lines]) == read([table, lines.parent])
    assert set(read([table, lines])) == set(rows(4))
    assert encode(read([lines])[0])["source"] == "ppo"


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.jsonl", "does not exist"), ("notes.txt", ".jsonl, .parquet"), (".", "ledger.jsonl")],
)
def test_what_is_no_ledger_is_named(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DocumentError, match=message):
        read([tmp_path / name])


def test_a_table_of_another_kind_is_refused(tmp_path):
    import pyarrow.parquet

    path = tmp_path / "odd.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), path)
    with pytest.raises(DocumentError, match="schema_version is none"):
        read([path])
    path.write_text("not a table")
    with pytest.raises(DocumentError, match="not a parquet file"):
        read([path])
