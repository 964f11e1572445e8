"""scripts/merge_ledgers.py: what does not belong to the architecture changes no file."""

from __future__ import annotations

from pathlib import Path

import merge_ledgers
import pytest

from zoo.errors import ZooError
from zoo.search.ledger import Key, Ledger, Row, read, write
from zoo.tracing.known_groups import reference_groups

pytest.importorskip("pyarrow")


def row(arch: str) -> Row:
    return Row(
        Key("base", "split", 10, 16, reference_groups(arch).sizes, "random", 0, "short"), 0.5, 1
    )


def test_evaluations_of_a_wider_network_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "resnet20-16.parquet"
    write([row("resnet20-16")], target)
    before = target.read_bytes()
    monkeypatch.setattr(merge_ledgers, "ledger_path", lambda _: target)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.add(row("resnet20-64"))
    options = merge_ledgers.Options("resnet20-16", (tmp_path,), all=True)
    with pytest.raises(ZooError, match="do not fit resnet20-16"):
        merge_ledgers.main(options)
    assert target.read_bytes() == before
    assert read([target]) == [row("resnet20-16")]
