from __future__ import annotations

import dataclasses
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from zoo.artefacts import save_checkpoint
from zoo.cost import cost_model
from zoo.data import load_data
from zoo.errors import ZooError
from zoo.models import build_model
from zoo.profile import Profile
from zoo.recipes import Recipe
from zoo.registry import stored_groups
from zoo.search import campaign
from zoo.search.campaign import SearchConfig, parse_budget, search_profile
from zoo.search.env import EnvSettings
from zoo.search.evaluation import Evaluator, FineTuning
from zoo.search.evidence import evidence, examined
from zoo.search.ledger import Ledger, read
from zoo.search.tasks import Task, load_tasks
from zoo.training import evaluate, finetune

pytest.importorskip("stable_baselines3")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.search.evaluation.SGD_STEPS", 5)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SearchConfig:
    """A tiny search of cnet on the digits at their own size of 8x8, with two base networks."""
    folder = tmp_path_factory.mktemp("campaign")
    splits = load_data("digits", size=8)
    paths = []
    for seed in range(2):
        module = build_model("cnet", 10, image_size=8, seed=seed)
        recipe = Recipe(epochs=6, lr=0.03, batch_size=64, augment=False)
        finetune(module, splits.train, splits.val, recipe=recipe, seed=seed, progress=False)
        paths.append(str(folder / f"base-{seed}.safetensors"))
        save_checkpoint(module, paths[-1], {"split_digest": splits.digest})
    return SearchConfig(
        arch="cnet", tasks=tuple(paths), out=folder / "run", cf=(2.0,), data="digits", size=8,
        episodes=16, workers=1, calibration_images=128, val_images=None, candidates=3,
        finalists=2, final_seeds=1, finetune_images=256,
    )  # fmt: skip


def search(config: SearchConfig) -> Profile:
    [profile] = search_profile(config)
    return profile


def load(config: SearchConfig) -> tuple[Task, ...]:
    return load_tasks(config.arch, config.tasks, config.data, config.data_dir, config.size)


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
    assert made.evaluations >= len(read([config.out]))
    assert made.split_digest == load_data("digits", size=8).digest
    assert [task.split()[0] for task in made.tasks] == ["base-0.safetensors", "base-1.safetensors"]
    assert "--cf 2.0" in made.command
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


def test_a_rerun_replays_and_a_killed_run_goes_on(config, searched, monkeypatch):
    path, again = config.out / "ledger.jsonl", dataclasses.replace(config, resume=True)
    whole = path.read_text()

    def nothing_new(*_args):
        raise AssertionError("evaluated again")

    with monkeypatch.context() as patch:
        patch.setattr("zoo.search.evaluation.cut", nothing_new)
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
    short = dataclasses.replace(config, out=tmp_path / "short", episodes=8)
    long = dataclasses.replace(config, out=tmp_path / "long")
    search(short)
    search(long)
    rows = [[(row.key, row.accuracy) for row in read([run.out])][:8] for run in (short, long)]
    assert rows[0] == rows[1]


def test_ctrl_c_ends_the_episodes_and_a_profile_comes_of_it(config, monkeypatch, tmp_path):
    original, calls = campaign.Recalibration.measure, []

    def measure(self, candidate):
        calls.append(candidate)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(self, candidate)

    monkeypatch.setattr(campaign.Recalibration, "measure", measure)
    profile = search(dataclasses.replace(config, out=tmp_path, episodes=64))
    assert profile.provenance.episodes == 8
    assert profile.got == pytest.approx(2.0, rel=0.02)
    assert len(calls) > 12


def test_a_budget_ends_the_episodes_of_every_factor(config, tmp_path):
    many = dataclasses.replace(
        config, out=tmp_path, cf=(2.0, 3.0), agent="random", episodes=100_000, budget="6s"
    )
    two, three = search_profile(many)
    assert (two.cf, three.cf) == (2.0, 3.0)
    assert three.got == pytest.approx(3.0, rel=0.02)
    for profile in (two, three):
        assert 0 < profile.provenance.episodes < 100_000
        assert Profile.read(tmp_path / f"{profile.name}.json") == profile
    report = (tmp_path / "report.md").read_text()
    assert "params-cf2" in report or "2x" in report
    assert (tmp_path / "keep_ratios.png").stat().st_size > 1000


def test_one_policy_serves_several_factors(config, tmp_path):
    both = dataclasses.replace(config, out=tmp_path, cf=(2.0, 3.0), conditioned=True, episodes=8)
    profiles = search_profile(both)
    assert [profile.cf for profile in profiles] == [2.0, 3.0]
    assert [profile.provenance.episodes for profile in profiles] == [8, 8]


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


@pytest.mark.parametrize(
    ("text", "seconds"), [("20m", 1200), ("1h30m", 5400), ("90s", 90), ("2h", 7200), ("1m1s", 61)]
)
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "0m", "20 m", "-5m", "5d", "30m1h"])
def test_what_is_no_budget(text):
    with pytest.raises(ZooError, match="no budget"):
        parse_budget(text)


def test_bad_input_is_refused(config, tmp_path):
    def refused(match: str, **changes) -> None:
        with pytest.raises(ZooError, match=match):
            search(dataclasses.replace(config, out=tmp_path, resume=True, **changes))

    refused("reaches", cf=(500.0,))
    refused("at least one task", tasks=())
    refused("Did you mean 'ppo'", agent="ppp")
    refused("no budget", budget="soon")
    splits = load_data("digits", size=8)
    path = str(tmp_path / "base.safetensors")
    save_checkpoint(build_model("cnet", 10, image_size=8), path, {"split_digest": "f00"})
    refused("another validation split", tasks=(path,))
    save_checkpoint(build_model("cnet", 10, image_size=8), path, {"split_digest": splits.digest})
    refused("near chance", tasks=(path,))
    save_checkpoint(build_model("resnet20", 10, image_size=8), path, {})
    refused("resnet20", tasks=(config.tasks[0], path))
    refused("classes", tasks=(f"{config.tasks[0]}@digits[:4]",))


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
    assert {row.key.split for row in ledger} == {splits.test.digest()}
