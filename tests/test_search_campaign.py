from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator

import pytest

from zoo.artefacts import save_checkpoint
from zoo.cost import cost_model
from zoo.data import load_data
from zoo.errors import FactorError, ZooError
from zoo.models import build_model
from zoo.profile import Profile
from zoo.registry import stored_groups
from zoo.search import campaign
from zoo.search.campaign import SearchConfig, load_tasks, search_profile
from zoo.search.evidence import evidence
from zoo.search.ledger import Ledger
from zoo.training import Recipe, finetune

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
        arch="cnet", tasks=tuple(paths), out=folder / "run", cf=2.0, data="digits", size=8,
        episodes=8, calibration_images=128, candidates=3, finalists=2, final_seeds=1,
        finetune_images=256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def searched(config) -> Profile:
    return search_profile(config)


def test_the_profile_meets_its_factor_at_the_reference_and_is_on_disk(config, searched):
    model = cost_model(stored_groups("cnet"))
    widths = [searched.kept[name] for name in stored_groups("cnet").names]
    assert searched.got == model.factor(widths, "params") == pytest.approx(2.0, rel=0.02)
    assert Profile.read(config.out / "params-cf2.json") == searched


def test_provenance_is_complete(config, searched):
    made = searched.provenance
    assert made.episodes == 8
    assert made.evaluations == len(Ledger(config.out / "ledger.jsonl"))
    assert made.split_digest == load_data("digits", size=8).digest
    assert [task.split()[0] for task in made.tasks] == ["base-0.safetensors", "base-1.safetensors"]
    assert "--cf 2.0" in made.command
    assert str(config.out.parent) not in made.command
    assert {"torch", "stable-baselines3", "python"} <= set(made.versions)


def test_the_winner_was_chosen_on_fresh_channels_by_fine_tuning(config, searched):
    rows = list(Ledger(config.out / "ledger.jsonl"))
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
    path = config.out / "ledger.jsonl"
    whole = path.read_text()

    def nothing_new(*_args):
        raise AssertionError("evaluated again")

    with monkeypatch.context() as patch:
        patch.setattr("zoo.search.evaluation.cut", nothing_new)
        assert search_profile(config).kept == searched.kept
    assert path.read_text() == whole
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:30])
    assert search_profile(config).kept == searched.kept
    seconds = '"seconds"'
    kept = [line.partition(seconds)[0] for line in path.read_text().splitlines()]
    assert kept == [line.partition(seconds)[0] for line in whole.splitlines()]


def test_the_search_does_not_touch_the_test_split(config, searched, monkeypatch, tmp_path):
    splits = dataclasses.replace(load_data("digits", size=8), test=None)
    monkeypatch.setattr(campaign, "load_data", lambda *_args, **_options: splits)
    assert search_profile(dataclasses.replace(config, out=tmp_path)).kept == searched.kept


def test_ctrl_c_ends_the_search_and_a_profile_comes_of_it(config, monkeypatch, tmp_path):
    original, calls = campaign.recalibration, []

    def interrupting(*args):
        fidelity = original(*args)

        def measure(*inner):
            calls.append(inner)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return fidelity.measure(*inner)

        return dataclasses.replace(fidelity, measure=measure)

    monkeypatch.setattr(campaign, "recalibration", interrupting)
    profile = search_profile(dataclasses.replace(config, out=tmp_path, episodes=64))
    assert profile.provenance.episodes == 3
    assert profile.got == pytest.approx(2.0, rel=0.02)


def test_without_projection_what_ships_still_meets_the_factor(config, tmp_path):
    loose = dataclasses.replace(config, out=tmp_path, projection="none", cf=3.0)
    assert search_profile(loose).got == pytest.approx(3.0, rel=0.03)


def test_bad_input_is_refused(config, tmp_path):
    with pytest.raises(FactorError, match="reaches"):
        search_profile(dataclasses.replace(config, cf=500.0, out=tmp_path))
    with pytest.raises(ZooError, match="at least one task"):
        load_tasks(dataclasses.replace(config, tasks=()))
    splits = load_data("digits", size=8)
    path = str(tmp_path / "leaky.safetensors")
    save_checkpoint(build_model("cnet", 10, image_size=8), path, {"split_digest": "f00"})
    with pytest.raises(ZooError, match="another validation split"):
        load_tasks(dataclasses.replace(config, tasks=(path,)))
    save_checkpoint(build_model("cnet", 10, image_size=8), path, {"split_digest": splits.digest})
    with pytest.raises(ZooError, match="near chance"):
        load_tasks(dataclasses.replace(config, tasks=(path,)))


def test_evidence_treats_every_policy_alike(config):
    base = load_tasks(config)[0]
    test = load_data("digits", size=8).test
    policies = {"whole": (32,) * 6, "thin": (4,) * 6}
    recipe = Recipe(epochs=1, lr=0.02, augment=False)
    dense, whole, thin = evidence("cnet", policies, base, test, recipe, (0, 1), train_images=256)
    assert (dense.policy, whole.policy, thin.policy) == ("base", "whole", "thin")
    assert dense.params == whole.params > thin.params
    assert whole.seeds == thin.seeds == (0, 1)
    assert whole.mean > thin.mean
    assert thin.sd == pytest.approx(statistics.stdev(thin.accuracies))
    assert len(thin.before) == len(thin.accuracies) == 2
    assert whole.fidelity == thin.fidelity
