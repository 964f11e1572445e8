"""The table of evaluations to a score: how it counts, and a run of seconds that goes on."""

from __future__ import annotations

import json
import math

import pytest
from learnt import base_networks

pytest.importorskip("stable_baselines3")
pytest.importorskip("cmaes")
pytest.importorskip("sklearn")

from evaluations_to_score import COLD, Options, doublings, evaluations_to, main, table, told


def test_scores_are_taken_at_every_doubling_and_at_the_end():
    assert doublings(640) == [8, 16, 32, 64, 128, 256, 512, 640]
    assert doublings(64) == [8, 16, 32, 64]
    assert doublings(5) == [5]


def test_evaluations_count_to_the_first_score_at_the_mark():
    assert evaluations_to(0.4, {8: 0.3, 16: 0.4, 32: 0.2, 64: 0.5}) == 16
    assert evaluations_to(0.4, {0: 0.4, 8: 0.3}) == 0
    assert evaluations_to(0.4, {8: 0.3}) == math.inf
    assert told([16, 32, math.inf], 64) == "32 (16 to over 64)"
    assert told([16, 16], 64) == "16"


def test_the_mark_is_the_final_score_of_the_cold_search():
    curves = {
        COLD: [{8: 0.2, 16: 0.4}, {8: 0.3, 16: 0.6}],
        "from": [{0: 0.5, 8: 0.6, 16: 0.6}, {0: 0.5, 8: 0.5, 16: 0.5}],
    }
    head, _, cold, warm = table(curves).splitlines()
    assert head == "| search | start | 8 | 16 | evaluations to 50.00% | seeds that reach it |"
    assert cold == f"| {COLD} |  | 25.0 ± 7.1 | 50.0 ± 14.1 | over 16 (16 to over 16) | 1 of 2 |"
    assert warm == "| from | 50.0 ± 0.0 | 55.0 ± 7.1 | 55.0 ± 7.1 | 0 | 2 of 2 |"


def test_the_score_of_a_search_that_ended_at_the_mark_stands_on():
    curves = {COLD: [{8: 0.2, 16: 0.4}], "from": [{0: 0.5}, {0: 0.1, 8: 0.3, 16: 0.5}]}
    *_, warm = table(curves).splitlines()
    assert warm == "| from | 30.0 ± 28.3 | 40.0 ± 14.1 | 50.0 ± 0.0 | 16 (0 to 16) | 2 of 2 |"


def test_a_search_that_stops_at_the_mark_measures_nothing_beyond(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("zoo.search.fidelities.SGD_STEPS", 1)
    options = Options(
        "cnet", (f"{base_networks(tmp_path)[0]}@digits",), tmp_path, tmp_path / "out", size=8,
        cf=(2.0,), metrics=("params",), evaluations=32, seeds=(0,), fresh=2, policy="equal",
        stop_at_mark=True,
    )  # fmt: skip
    main(options)
    (told_scores,) = (options.out / "scores.jsonl").read_text().splitlines()
    curves = json.loads(told_scores)["curves"]
    (cold,) = curves.pop(COLD)
    assert list(cold) == ["8", "16", "32"]
    for (curve,) in curves.values():
        first = next((n for n, score in curve.items() if score >= cold["32"]), "32")
        assert list(curve)[-1] == first
    assert "32 |" in capsys.readouterr().out


def test_a_run_goes_on_and_scores_on_channels_that_no_search_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("zoo.search.fidelities.SGD_STEPS", 1)
    options = Options(
        "cnet", (f"{base_networks(tmp_path)[0]}@digits",), tmp_path, tmp_path / "out", size=8,
        cf=(2.0,), metrics=("params",), evaluations=16, seeds=(0,), draws=2, fresh=2,
    )  # fmt: skip
    main(options)
    first = capsys.readouterr().out
    assert "cnet, 2x params" in first
    assert first.count("| PPO") == 2
    assert first.count(f"| {COLD}") == 3
    file = options.out / "ledger.jsonl"
    rows = file.read_text()
    assert {line.partition('"seed": ')[2].split(",")[0] for line in rows.splitlines()} == {
        "0", "1", "1000", "1001",
    }  # fmt: skip
    main(options)
    assert capsys.readouterr().out == first
    assert file.read_text() == rows
