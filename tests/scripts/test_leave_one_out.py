"""scripts/evidence/leave_one_out.py: trained without an architecture, measured on it, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import leave_one_out
import policies
import pytest
from learnt import base_networks

import zoo
from zoo.search.fidelities import Fidelity
from zoo.search.ledger import merge, read
from zoo.search.tasks import Candidate
from zoo.search.transfer import TransferSettings
from zoo.search.workers import InProcess
from zoo.storage.artefacts import save_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A base network of cnet and one of resnet20-16, of the digits at 8x8."""
    folder = tmp_path_factory.mktemp("bases")
    splits = zoo.load_data("digits", size=8)
    other = zoo.create_model("resnet20-16", splits.num_classes, image_size=8)
    zoo.finetune(
        other, splits.train, splits.val, teacher=None, recipe=zoo.Recipe(epochs=3, lr=0.05)
    )
    path = folder / "other.safetensors"
    save_checkpoint(other, path, {"split_digest": splits.digest})
    return f"cnet={base_networks(folder)[0]}@digits", f"resnet20-16={path}@digits"


def nothing_is_measured(_: InProcess, candidates: Sequence[Candidate], __: Fidelity) -> Iterator:
    assert not candidates
    return iter(())


def test_what_was_left_out_was_not_trained_on(tasks, tmp_path: Path, capsys, monkeypatch) -> None:
    options = leave_one_out.Options(
        tasks=tasks, data_dir=tmp_path, out=tmp_path / "out", size=8, cf=(2.0,), finetune_epochs=1,
        images=200, seeds=(0,), distill_steps=2,
        settings=TransferSettings(episodes=8, round_steps=32, draws=1, factors=(2.0,)),
    )  # fmt: skip
    leave_one_out.main(options)
    table = capsys.readouterr().out.partition("<!--")[2]
    for arch, other in (("cnet", "resnet20-16"), ("resnet20-16", "cnet")):
        document = json.loads((tmp_path / "out" / arch / "policy.json").read_text())
        assert document["architectures"] == [other]
        assert f"| {arch} | 2x macs |" in table
        assert f"| {arch} | 2x params |" in table
    for policy in (*leave_one_out.RIVALS, "learned", "learned, no data"):
        assert f" {policy} |" in table

    names = "ledger.jsonl", "evidence.jsonl"
    ledgers = [path for path in (tmp_path / "out").glob("*/*") if path.name in names]
    monkeypatch.setattr(InProcess, "run", nothing_is_measured)
    before = read(ledgers)
    leave_one_out.main(options)
    assert read(ledgers) == before
    assert capsys.readouterr().out.partition("<!--")[2] == table

    rows = tmp_path / "out" / "cnet" / policies.ROWS
    whole = rows.read_text()
    policies.main(replace(leave_one_out._exam("cnet", rows.parent, options), metrics=("params",)))
    assert rows.read_text() == whole  # those by MACs, too

    registry = tmp_path / "registry"
    merge(ledgers, registry / "ledger" / "both.parquet")
    monkeypatch.setattr("zoo.search.lookup.registry_folder", lambda: registry)
    leave_one_out.main(replace(options, out=tmp_path / "elsewhere"))
    elsewhere = capsys.readouterr().out.partition("<!--")[2]
    assert elsewhere.partition("-->")[2] == table.partition("-->")[2]


def test_the_sibling_and_the_recipe_of_users_are_rows_beside_the_policies(
    tasks, tmp_path: Path, capsys
) -> None:
    policies.main(
        policies.Options(
            arch="cnet", exams=(tasks[0].partition("=")[2],), data_dir=tmp_path,
            out=tmp_path / "out", size=8, cf=(3.0,), metrics=("params",), epochs=1, images=200,
            policies=("equal",), sibling_epochs=1, standard=("equal", "increasing"),
        )
    )  # fmt: skip
    shown = capsys.readouterr().out.splitlines()
    (line,) = (tmp_path / "out" / policies.ROWS).read_text().splitlines()
    base, equal, sibling, longer = json.loads(line)["rows"]
    assert [row["policy"] for row in (base, equal, sibling, longer)] == [
        "base", "equal", "sibling", "equal, recipe standard",
    ]  # fmt: skip
    assert [len(row["seeds"]) for row in (equal, sibling, longer)] == [2, 1, 1]
    assert equal["params"] == sibling["params"] == longer["params"] < base["params"]
    assert "dense network as teacher" in longer["fidelity"]
    assert longer["mean"] > equal["mean"]
    assert not any(row.endswith("recipe standard |") for row in shown)  # it dominates none


def test_what_cannot_be_left_out_is_an_error(tasks, tmp_path: Path) -> None:
    options = leave_one_out.Options(
        tasks=tasks, data_dir=tmp_path, out=tmp_path, turns=("resnet56",)
    )
    with pytest.raises(SystemExit, match="resnet56 cannot be left out of cnet, resnet20-16"):
        leave_one_out.main(options)
