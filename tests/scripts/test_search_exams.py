"""scripts/evidence/examine.py: what it examines, against whom, and what goes into the registry."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import examine
import pytest
from learnt import base_networks

from zoo.errors import ZooError
from zoo.search.campaign import SearchConfig, SearchInterrupted
from zoo.search.ledger import read
from zoo.spec.profile import Profile

pytest.importorskip("stable_baselines3")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> examine.Options:
    folder = tmp_path_factory.mktemp("exams")
    task, exam = base_networks(folder)
    search = SearchConfig(
        arch="cnet", tasks=(task,), out=folder / "run", cf=(2.0,), data="digits", size=8,
        episodes=8, workers=1, calibration_images=64, val_images=None, candidates=2,
        finalists=1, final_seeds=1, finetune_images=64, std=0.2,
    )  # fmt: skip
    return examine.Options(
        search=search, exams=(exam,), rivals=("equal", "greedy"), rival_agents=("random",),
        random=3, images=128, epochs=1, seeds=(0, 1), bundle=True,
    )  # fmt: skip


@pytest.fixture
def registry(monkeypatch, tmp_path) -> Path:
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setattr(examine, "REGISTRY", folder)
    return folder


@pytest.mark.slow
def test_a_profile_is_bundled_with_the_figures_of_every_rival(config, registry, capsys):
    examine.main(config)
    told = capsys.readouterr().out
    profile = Profile.read(registry / "cnet" / "params-cf2.json")
    rows = {row.policy: row for row in profile.evidence}
    assert list(rows) == ["base", "searched", "random, best", "random", "equal", "greedy"]
    measured = {row.key: row.accuracy for row in read([config.search.out / "evidence.jsonl"])}
    for name, row in rows.items():
        assert row.data.endswith("test split")
        assert row.network == next(iter(measured)).network
        if name != "base":
            assert len(row.accuracies) == len(row.before) == 2
            assert set(row.accuracies + row.before) <= set(measured.values())
    ranked = [a for key, a in measured.items() if key.seed == 0 and "1 epochs" in key.fidelity]
    assert len(ranked) >= 4  # the profile and three random ones, among others
    assert "of 3 random profiles are as good" in told
    assert told.count("over 2 pairs of 1 base networks") == 4
    assert json.loads((registry / "index.json").read_text())

    shutil.rmtree(registry)
    registry.mkdir()
    with pytest.MonkeyPatch.context() as patch:  # again, from the ledgers alone
        patch.setattr("zoo.search.fidelities.cut", None)
        examine.main(config)
    assert Profile.read(registry / "cnet" / "params-cf2.json") == profile
    assert capsys.readouterr().out == told


def test_a_base_network_that_a_search_saw_is_no_exam(config, registry):
    (task,), (exam,) = config.search.tasks, config.exams
    seen = dataclasses.replace(config, exams=(exam, task))
    judged = dataclasses.replace(
        config, search=dataclasses.replace(config.search, held_back=config.exams)
    )
    for own in (seen, judged):
        with pytest.raises(ZooError, match="an exam needs another base network"):
            examine.main(own)
    assert not list(registry.iterdir())


def test_an_interrupted_search_is_not_examined(config, registry, monkeypatch, tmp_path):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.search.fidelities.Recalibration.measure", interrupted)
    monkeypatch.setattr("zoo.search.fidelities.FineTuning.measure", lambda *_: 0.5)
    search = dataclasses.replace(config.search, out=tmp_path / "run", agent="random", std=0.3)
    with pytest.raises(SearchInterrupted):
        examine.main(dataclasses.replace(config, search=search))
    assert not list(registry.iterdir())
