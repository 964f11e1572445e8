"""Searches: the profile that comes of one, what it has measured, and what interruptions leave."""

from __future__ import annotations

import dataclasses
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_search import load, quick, search, tiny_search  # noqa: F401

from zoo.data.datasets import load_data
from zoo.errors import DocumentError, FactorError, ZooError
from zoo.planning.policies import POLICIES
from zoo.registry.store import stored_groups
from zoo.search.env import EnvSettings
from zoo.search.evaluation import Evaluator
from zoo.search.evidence import evidence, examined, policy_widths
from zoo.search.fidelities import FineTuning, FromScratch, Recalibration
from zoo.search.ledger import TEST, Ledger, merge, read
from zoo.search.run import SearchConfig, SearchInterrupted, _Search, search_profile
from zoo.spec.cost import cost_model
from zoo.spec.profile import Profile
from zoo.training.finetuning import evaluate
from zoo.training.recipes import Recipe

pytest.importorskip("stable_baselines3")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SearchConfig:
    return tiny_search(tmp_path_factory.mktemp("campaign"))


@pytest.fixture(scope="module")
def searched(config) -> Profile:
    return search(config)


def test_the_profile_meets_its_factor_at_the_reference_and_is_on_disk(config, searched):
    model = cost_model(stored_groups("cnet"))
    widths = [searched.kept[name] for name in stored_groups("cnet").names]
    assert searched.got == model.factor(widths, "params") == pytest.approx(2.0, rel=0.02)
    assert Profile.read(config.out / "params-cf2.json") == searched


def test_provenance_is_complete(config, searched):
    made = searched.provenance
    assert made.episodes == 16
    policies = sum(row.source in POLICIES for row in read([config.out]))
    assert made.evaluations == len(read([config.out]))
    assert policies == 5 * 2
    assert made.split_digest == load_data("digits", size=8).digest
    assert [task.split()[0] for task in made.tasks] == ["base-0.safetensors", "base-1.safetensors"]
    assert "--cf 2.0" in made.command
    assert "--episodes 16" in made.command
    assert str(config.out.parent) not in made.command
    assert {"torch", "stable-baselines3", "python"} <= set(made.versions)


def test_the_winner_was_chosen_on_fresh_channels_by_fine_tuning(config, searched):
    rows = read([config.out])
    final = [row for row in rows if row.key.fidelity.startswith("fine-tune")]
    earlier = {row.key.seed for row in rows if row not in final}
    assert not earlier & {row.key.seed for row in final}
    means = {}
    for row in final:
        means.setdefault(row.key.widths, []).append(row.accuracy)
    assert len(means) == 2
    assert all(len(accuracies) == 2 for accuracies in means.values())
    assert tuple(searched.kept.values()) in means


def test_episodes_and_candidates_are_fine_tuned_where_that_is_asked_for(config, tmp_path):
    own = dataclasses.replace(config, out=tmp_path, episodes=8, episode_images=128)
    search(own)
    fidelities = {row.key.fidelity for row in read([own.out])}
    assert len(fidelities) == 2
    assert {name.split(", recipe")[0] for name in fidelities} == {
        "fine-tune, 1 epochs of 128 training images",
        "fine-tune, 1 epochs of 256 training images",
    }


def test_a_rerun_replays_and_a_killed_run_goes_on(config, searched, monkeypatch):
    path, again = config.out / "ledger.jsonl", dataclasses.replace(config, resume=True)
    whole = path.read_text()

    def nothing_new(*_args):
        raise AssertionError("evaluated again")

    with monkeypatch.context() as patch:
        patch.setattr("zoo.search.fidelities.cut", nothing_new)
        assert search(again).kept == searched.kept
    assert path.read_text() == whole
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:30])
    assert search(again).kept == searched.kept
    seconds = '"seconds"'
    kept = [line.partition(seconds)[0] for line in path.read_text().splitlines()]
    assert kept == [line.partition(seconds)[0] for line in whole.splitlines()]
    with pytest.raises(ZooError, match="holds a run already: add --resume"):
        search(config)


def test_a_replay_elsewhere_does_not_change_where_a_profile_comes_from(
    config, searched, monkeypatch
):
    monkeypatch.setattr("zoo.search.provenance._machine", lambda: "another machine")
    assert search(dataclasses.replace(config, resume=True)) == searched
    file = config.out / "params-cf2.json"
    file.unlink()
    made = search(dataclasses.replace(config, resume=True)).provenance
    assert made.machine == "another machine"
    searched.write(file)


def test_what_other_runs_have_measured_is_not_measured_again(
    config, searched, monkeypatch, tmp_path
):
    merge([config.out], tmp_path / "merged.parquet")
    own = dataclasses.replace(config, out=tmp_path / "own", known=(tmp_path / "merged.parquet",))
    with monkeypatch.context() as patch:
        patch.setattr("zoo.search.fidelities.cut", None)
        assert search(own).kept == searched.kept
    rows, before = ({row.key: row for row in read([run.out])} for run in (own, config))
    assert rows == before
    with pytest.raises(DocumentError, match="does not exist"):
        search(dataclasses.replace(own, out=tmp_path / "other", known=(tmp_path / "none",)))


@pytest.mark.slow
def test_sigkill_loses_at_most_what_was_being_measured(config, tmp_path):
    flags = ["search", "--arch", "cnet", "--tasks", config.tasks[0], "--out", str(tmp_path)]
    flags += ["--cf", "2", "--data", "digits", "--size", "8", "--episodes", "16", "--workers", "1"]
    flags += ["--candidates", "1", "--finalists", "1", "--final-seeds", "1"]
    command = [sys.executable, "-c", "import sys, zoo.cli; sys.exit(zoo.cli.main(sys.argv[1:]))"]
    ledger = tmp_path / "ledger.jsonl"
    running = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while time.monotonic() < end and running.poll() is None:
        if ledger.exists() and ledger.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.01)
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    before = ledger.read_bytes()
    assert 5 <= before.count(b"\n") < 16
    whole = before[: before.rindex(b"\n") + 1]
    again = subprocess.run([*command, *flags, "--resume"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert ledger.read_bytes().startswith(whole)
    keys = [row.key for row in read([tmp_path])]
    assert len(keys) == len(set(keys)) > 16
    assert (tmp_path / "params-cf2.json").is_file()


def test_the_search_does_not_touch_the_test_split(config, searched, monkeypatch, tmp_path):
    splits = dataclasses.replace(load_data("digits", size=8), test=None)
    monkeypatch.setattr("zoo.search.tasks.load_data", lambda *_args, **_options: splits)
    assert search(dataclasses.replace(config, out=tmp_path)).kept == searched.kept


def test_a_second_process_cannot_write_the_same_run(config, searched):
    del searched
    with Ledger(config.out / "ledger.jsonl"), pytest.raises(ZooError, match="ledger"):
        search(dataclasses.replace(config, resume=True))


def test_two_runs_agree_on_their_common_prefix(config, tmp_path):
    short = dataclasses.replace(config, out=tmp_path / "short")
    long = dataclasses.replace(config, out=tmp_path / "long", episodes=24)
    search(short)
    search(long)
    rows = [[(row.key, row.accuracy) for row in read([run.out])][:16] for run in (short, long)]
    assert rows[0] == rows[1]
    assert {row.source for row in read([short.out])[:16]} == {"ppo"}


def test_ctrl_c_ends_the_episodes_and_a_profile_comes_of_it(config, monkeypatch, tmp_path):
    original, calls = Recalibration.measure, []

    def measure(self, candidate):
        calls.append(candidate)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(self, candidate)

    monkeypatch.setattr(Recalibration, "measure", measure)
    with pytest.raises(SearchInterrupted) as stopped:
        search_profile(dataclasses.replace(config, out=tmp_path, cf=(2.0, 3.0), episodes=64))
    (profile,) = stopped.value.profiles
    assert Profile.read(tmp_path / "params-cf2.json") == profile
    assert (profile.cf, profile.provenance.episodes) == (2.0, 8)
    assert profile.got == pytest.approx(2.0, rel=0.02)
    assert len(calls) > 12


@pytest.mark.slow
def test_a_budget_ends_the_episodes_of_every_factor(config, tmp_path):
    many = dataclasses.replace(
        config, out=tmp_path, cf=(2.0, 3.0), agent="random", episodes=100_000, budget="6s"
    )
    two, three = search_profile(many)
    assert (two.cf, three.cf) == (2.0, 3.0)
    assert three.got == pytest.approx(3.0, rel=0.02)
    played = [profile.provenance.episodes for profile in (two, three)]
    assert min(played) > 0
    assert max(played) < 4 * min(played) < 100_000  # choosing at 2x took nothing from 3x
    for profile in (two, three):
        assert Profile.read(tmp_path / f"{profile.name}.json") == profile
    report = (tmp_path / "report.md").read_text()
    assert "params-cf2.json" in report
    assert "params-cf3.json" in report
    assert (tmp_path / "keep_ratios.png").stat().st_size > 1000
    again = search_profile(dataclasses.replace(many, resume=True))
    for before, profile in zip(played, again, strict=True):  # what was replayed counts, too
        assert before <= profile.provenance.episodes <= 2 * before


def test_one_policy_serves_several_factors(config, tmp_path):
    both = dataclasses.replace(config, out=tmp_path, cf=(2.0, 3.0), conditioned=True, episodes=8)
    profiles = search_profile(both)
    assert [profile.cf for profile in profiles] == [2.0, 3.0]
    assert [profile.provenance.episodes for profile in profiles] == [8, 8]


def test_the_best_of_every_task_are_candidates_though_one_is_easier():
    def episode(number: int, task: str, reward: float) -> dict:
        return {"cf": 2.0, "task": task, "widths": (number,), "reward": reward}

    easy = [episode(number, "easy", 0.9 - number / 100) for number in range(5)]
    hard = [episode(10 + number, "hard", 0.2 - number / 100) for number in range(5)]
    search = _Search.__new__(_Search)
    search.episodes = [*easy, *hard, {**easy[0], "cf": 3.0, "widths": (99,)}]
    search.tasks = [SimpleNamespace(name="easy"), SimpleNamespace(name="hard")]
    search.config = SearchConfig("cnet", ("a",), Path("out"), candidates=4)
    found = search._candidates(2.0, [episode(50, "hard", 0.0)])
    assert found == [(0,), (10,), (1,), (11,), (50,)]


@pytest.mark.parametrize("agent", ["ppo", "random"])
def test_ctrl_c_before_any_episode_leaves_nothing_and_says_so(
    config, monkeypatch, tmp_path, capsys, agent
):
    calls = []

    def measure(*arguments):
        calls.append(arguments)
        if len(calls) <= 1:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr(Recalibration, "measure", measure)
    monkeypatch.setattr(FineTuning, "measure", lambda *_: 0.5)
    with pytest.raises(SearchInterrupted) as stopped:
        search_profile(dataclasses.replace(config, out=tmp_path, agent=agent, cf=(2.0, 3.0)))
    assert len(stopped.value.profiles) == (1 if agent == "ppo" else 0)
    if agent == "random":
        assert "nothing to choose from" in capsys.readouterr().err
        assert "chose no profile" in (tmp_path / "report.md").read_text()


def test_a_folder_holds_the_runs_of_one_search(config, searched):
    del searched
    first, second = config.tasks
    for changes in ({"tasks": (second,)}, {"tasks": (first,), "held_back": (second,)}):
        with pytest.raises(ZooError, match="other base networks"):
            search(dataclasses.replace(config, resume=True, **changes))


def test_a_search_that_could_not_start_leaves_the_folder_free(config, tmp_path):
    with pytest.raises(FactorError, match="reaches"):
        search(dataclasses.replace(config, out=tmp_path, cf=(500.0,)))
    assert search(dataclasses.replace(config, out=tmp_path, episodes=8)).cf == 2.0


def test_held_back_networks_judge_the_finalists_alone(config, tmp_path):
    first, second = config.tasks
    apart = dataclasses.replace(config, out=tmp_path, tasks=(first,), held_back=(second,))
    profile = search(apart)
    network = {task.name: task.network for task in load(config)}
    by = {name: set() for name in network}
    for row in read([tmp_path]):
        name = next(name for name, digest in network.items() if digest == row.key.network)
        by[name].add(row.key.fidelity.partition(",")[0])
    assert list(by.values()) == [{"recalibration"}, {"fine-tune"}]
    assert "for the choice alone" in profile.provenance.tasks[1]
    with pytest.raises(ZooError, match="held-back"):
        search(dataclasses.replace(apart, held_back=(first,), resume=True))


@pytest.mark.parametrize("projection", ["none", "bound"])
def test_without_exact_projection_what_ships_still_meets_the_factor(config, projection, tmp_path):
    env = EnvSettings(projection=projection)
    loose = dataclasses.replace(config, out=tmp_path, env=env, cf=(3.0,), episodes=8)
    assert search(loose).got == pytest.approx(3.0, rel=0.03)


def test_the_sibling_is_a_row_of_the_widths_of_equal(config):
    exam = examined(load(config)[0], load_data("digits", size=8).test)
    cost = cost_model(stored_groups("cnet"))
    policies = policy_widths(("equal", "global", "global-bn", "knapsack"), exam, cost, 2, "macs")
    assert list(policies) == ["equal", "global", "knapsack"]  # no batch norm to rank by
    assert all(cost.factor(w, "macs") == pytest.approx(2, rel=0.02) for w in policies.values())
    tuned = FineTuning(Recipe(epochs=1, lr=0.02, augment=False), 64)
    scratch = FromScratch(Recipe(epochs=2, lr=0.02, augment=False), 64)
    equal = {"equal": policies["equal"]}
    rows = evidence(equal, exam, Evaluator(Ledger()), tuned, (0, 1), cost, sibling=scratch)
    assert [row.policy for row in rows] == ["base", "equal", "sibling"]
    assert (rows[2].params, rows[2].macs) == (rows[1].params, rows[1].macs)
    assert rows[2].fidelity == "trained from scratch 2 epochs of 64 images"
    assert len(rows[2].accuracies) == 1
    assert rows[2].before == ()
    other = dataclasses.replace(exam, network="of another seed")
    again = evidence(equal, other, Evaluator(Ledger()), tuned, (0, 1), cost, sibling=scratch)
    assert again[1].accuracies == rows[1].accuracies  # what is cut has the same weights here
    assert again[2].accuracies != rows[2].accuracies


def test_evidence_treats_every_policy_alike(config):
    splits = load_data("digits", size=8)
    exam = examined(load(config)[0], splits.test)
    policies = {"whole": (32,) * 6, "thin": (4,) * 6}
    fidelity = FineTuning(Recipe(epochs=1, lr=0.02, augment=False), 256)
    ledger = Ledger()
    cost = cost_model(stored_groups("cnet"))
    dense, whole, thin = evidence(policies, exam, Evaluator(ledger), fidelity, (0, 1), cost)
    assert (dense.policy, whole.policy, thin.policy) == ("base", "whole", "thin")
    assert dense.params == whole.params > thin.params
    assert whole.seeds == thin.seeds == (0, 1)
    assert dense.mean == evaluate(exam.module, splits.test).accuracy
    assert whole.mean > thin.mean
    assert thin.sd == pytest.approx(statistics.stdev(thin.accuracies))
    assert len(thin.before) == len(thin.accuracies) == 2
    assert whole.fidelity == thin.fidelity
    assert (exam.val, exam.split_digest) == (splits.test, splits.test.digest())
    assert {row.key.split for row in ledger} == {exam.data_digest}
    assert exam.data_digest.startswith(TEST)
    assert not load(config)[0].data_digest.startswith(TEST)
    assert {row.key.split for row in ledger} == {exam.data_digest}
