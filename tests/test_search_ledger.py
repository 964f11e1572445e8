from __future__ import annotations

import dataclasses
import json

import pytest

from zoo.errors import DocumentError
from zoo.search.ledger import Key, Ledger, Row, merge, read_parquet

KEY = Key("base", "split", 10, 16, (3, 5), "random", 7, "recalibration")


def rows(count: int) -> list[Row]:
    return [
        Row(dataclasses.replace(KEY, seed=seed), 0.5 + seed / 100, 1.5) for seed in range(count)
    ]


def test_a_reopened_ledger_has_every_row(tmp_path):
    path = tmp_path / "run" / "ledger.jsonl"
    ledger = Ledger(path)
    for row in rows(3):
        ledger.add(row)
    again = Ledger(path)
    assert list(again) == rows(3)
    assert again.get(rows(3)[1].key) == rows(3)[1]
    assert again.get(dataclasses.replace(KEY, fidelity="fine-tune")) is None


def test_each_row_is_on_disk_before_the_next(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for count, row in enumerate(rows(3), start=1):
        ledger.add(row)
        assert len(Ledger(tmp_path / "ledger.jsonl")) == count


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path, cut):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for row in rows(2):
        ledger.add(row)
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    path.write_bytes(whole[: max(first_line + 1, len(whole) - cut)])
    torn = Ledger(path)
    assert list(torn) == rows(1)
    torn.add(rows(3)[2])
    assert list(Ledger(path)) == [rows(3)[0], rows(3)[2]]


def test_a_file_with_only_a_torn_line_is_empty(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"schema_version": 1, "key"')
    assert len(Ledger(path)) == 0
    assert path.read_bytes() == b""


def test_another_schema_version_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).add(rows(1)[0])
    text = json.dumps({**json.loads(path.read_text()), "schema_version": 99}) + "\n"
    path.write_text(text)
    with pytest.raises(DocumentError, match="schema_version"):
        Ledger(path)
    assert path.read_text() == text


def test_a_malformed_row_names_its_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).add(rows(1)[0])
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(DocumentError, match="line 2"):
        Ledger(path)
    path.write_text(path.read_text().replace("not json\n", '{"schema_version": 1, "kee": 1}\n'))
    with pytest.raises(DocumentError, match="kee"):
        Ledger(path)


def test_merged_ledgers_hold_every_row_once(tmp_path):
    one, two = Ledger(), Ledger()
    for row in rows(4):
        one.add(row)
    for row in rows(6)[2:]:
        two.add(row)
    path = tmp_path / "merged" / "all.parquet"
    assert merge([one, two], path) == 6
    assert sorted(read_parquet(path), key=lambda row: row.key.seed) == rows(6)
    first = path.read_bytes()
    merge([two, one], path)
    assert path.read_bytes() == first


def test_a_table_of_another_kind_is_refused(tmp_path):
    import pyarrow.parquet

    path = tmp_path / "odd.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), path)
    with pytest.raises(DocumentError, match="schema_version is none"):
        read_parquet(path)
