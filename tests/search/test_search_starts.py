"""Searches that start from a profile: what they begin with, what they record, what is refused."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tiny_search import load, quick, search, tiny_search  # noqa: F401

from zoo.errors import ZooError
from zoo.planning.decisions import FEATURES
from zoo.planning.learned import LearnedPolicy, Training
from zoo.planning.policies import policy_solution
from zoo.planning.solver import FLOOR, scale_curve, solve
from zoo.registry.store import get_profile
from zoo.search.agents import AGENTS, STARTING, agent
from zoo.search.ledger import read
from zoo.search.run import SearchConfig
from zoo.spec.cost import cost_model
from zoo.tracing.known_groups import reference_groups

pytest.importorskip("gymnasium")
pytest.importorskip("stable_baselines3")
pytest.importorskip("cmaes")
pytest.importorskip("pymoo")
pytest.importorskip("sklearn")

from synthetic import Synthetic

from zoo.search.env import EnvSettings, PruningEnv, keep_ratio
from zoo.search.evidence import policy_widths
from zoo.search.starts import check_start, start_at
from zoo.search.vector_env import PruningVectorEnv

BATCHED = ("cma-es", "genetic", "swarm", "annealing")


@cache
def problem() -> Synthetic:
    return Synthetic(0)


def started(ratios, cf=4.0, num_envs: int = 8, **settings) -> PruningVectorEnv:
    known, factors = problem(), np.atleast_1d(cf).tolist()
    start = dict.fromkeys(factors, ratios)
    return PruningVectorEnv(
        lambda: PruningEnv(
            known.tasks, known.groups, cf, known.evaluate, EnvSettings(**settings), start=start
        ),
        num_envs,
    )


def projected(ratios, cf=4.0) -> tuple[int, ...]:
    return solve(cost_model(problem().groups), scale_curve(ratios), cf).widths


def some_ratios(seed: int) -> list[float]:
    return np.random.default_rng(seed).uniform(FLOOR, 1, len(problem().groups.sizes)).tolist()


def test_actions_are_corrections_of_the_start():
    for start in (FLOOR, 0.37, 1.0):
        assert keep_ratio(0.0, start) == start
        assert keep_ratio(-1.0, start) == pytest.approx(FLOOR)
        assert keep_ratio(1.0, start) == pytest.approx(1.0)
        ratios = [keep_ratio(action, start) for action in np.linspace(-1.5, 1.5, 31)]
        assert ratios == sorted(ratios)
    assert keep_ratio(0.0) == pytest.approx((1 + FLOOR) / 2)


@pytest.mark.parametrize("cf", [4.0, 2.5])
def test_the_zero_action_is_the_start(cf):
    ratios = some_ratios(1)
    env = started(ratios, cf)
    env.reset(seed=0)
    for _ in ratios:
        infos = env.step(np.zeros((8, 1), dtype=np.float32))[-1]
    assert {episode["actions"] for episode in infos["played"]} == {tuple(ratios)}
    assert {episode["widths"] for episode in infos["played"]} == {projected(ratios, cf)}


@pytest.mark.parametrize("name", BATCHED)
def test_the_first_candidate_is_the_start_and_the_others_are_near_it(name):
    ratios, played = some_ratios(2), []
    agent(name)(started(ratios), 32, seed=0, on_episode=played.append)
    own, *others = played[::2]  # every candidate is played on two tasks
    assert own["actions"] == tuple(ratios)
    assert own["widths"] == projected(ratios)
    distances = [np.abs(np.subtract(other["actions"], ratios)).mean() for other in others]
    assert 0.01 < statistics.mean(distances[:7]) < 0.2


def test_every_factor_has_its_own_start():
    known, played = problem(), []
    starts = {2.0: some_ratios(3), 6.0: some_ratios(4)}
    env = PruningVectorEnv(
        lambda: PruningEnv(known.tasks, known.groups, (2.0, 6.0), known.evaluate, start=starts), 8
    )
    agent("cma-es")(env, 64, seed=0, on_episode=played.append)
    for cf, ratios in starts.items():
        first = next(episode for episode in played if episode["cf"] == cf)
        assert first["widths"] == projected(ratios, cf)


@pytest.mark.parametrize("name", STARTING)
def test_a_start_near_the_optimum_saves_evaluations(name):
    known, rng = problem(), np.random.default_rng(0)
    near = np.clip(known.best * np.exp(rng.normal(0, 0.15, len(known.best))), FLOOR, 1).tolist()

    def reached(env: PruningVectorEnv) -> float:
        played = []
        agent(name)(env, 48, seed=0, on_episode=played.append)
        return max(episode["reward"] for episode in played) / known.optimum

    assert reached(started(near)) > max(0.93, reached(known.env()))


def test_a_cold_search_draws_from_the_middle_as_before():
    from cmaes import CMA

    count = len(problem().groups.sizes)
    method = CMA(
        mean=np.full(count, 0.6), sigma=0.225, bounds=np.array([[0.1, 1.0]] * count), seed=5,
        population_size=8,
    )  # fmt: skip
    played = []
    agent("cma-es")(problem().env(), 16, seed=5, on_episode=played.append)
    for episode in played[::2]:
        np.testing.assert_allclose(episode["actions"], method.ask(), rtol=1e-12)


def test_an_accuracy_is_the_mean_of_its_draws():
    known, calls = problem(), []

    def evaluate(candidates):
        calls.extend(candidates)
        return [0.3 + candidate.seed % 10 / 100 for candidate in candidates]

    settings = EnvSettings(draws=3)
    env = PruningEnv(known.tasks, known.groups, 4.0, evaluate, settings)
    once = PruningEnv(known.tasks, known.groups, 4.0, evaluate)
    for number in range(2):
        env.begin(number)
        for _ in known.groups.sizes:
            env.decide(0.5)
        [info] = env.score([env.finish()])
        seeds = [candidate.seed for candidate in calls[-3:]]
        assert seeds == [1000 + number, 1002 + number, 1004 + number]
        assert info["accuracy"] == pytest.approx(0.32 + number / 100)
        assert info["channel_seed"] == once.queue[number].channel_seeds[0] == seeds[0]
    assert len({seed for entry in env.queue for seed in entry.channel_seeds}) == 6
    with pytest.raises(ZooError, match="draws"):
        EnvSettings(draws=0)


@pytest.mark.parametrize("name", sorted(set(AGENTS) - set(STARTING)))
def test_agents_without_a_start_say_which_have_one(name):
    with pytest.raises(ZooError, match=rf"{name}.*ppo.*cma-es"):
        agent(name)(started(some_ratios(0)), 8, seed=0, on_episode=print)
    with pytest.raises(ZooError, match=rf"from global is for ppo and .*annealing, not {name}"):
        SearchConfig("cnet", ("a",), Path("out"), agent=name, start="global")


def test_a_start_has_one_keep_ratio_for_every_group():
    for ratios in ([0.5], [0.5] * 12 + [1.5]):
        with pytest.raises(ZooError, match="13 keep ratios"):
            started(ratios)


@pytest.mark.parametrize(
    ("arch", "cf", "name"),
    [
        ("resnet20", 4.0, "learned"),
        ("cnet", 8.0, "global"),
        ("cnet", 6.0, "learned"),  # though global-lamp was ahead of it on the exams
        ("cnet", 4.0, "learned"),  # though the searched one was
    ],
)
def test_a_start_is_what_best_stands_for_and_is_named_so(arch, cf, name):
    groups = reference_groups(arch)
    found, profile = check_start("best", arch, groups, cf, "macs")
    assert (found, profile) == check_start(name, arch, groups, cf, "macs")
    assert found == name
    assert (profile is None) == (":" not in name)


# --- whole searches -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SearchConfig:
    own = tiny_search(tmp_path_factory.mktemp("starts"))
    return dataclasses.replace(own, agent="cma-es", start="global", distill_steps=3)


@pytest.fixture(scope="module")
def searched(config):
    return search(config)


def test_a_search_from_a_ranking_begins_at_the_mean_over_its_tasks(config, searched):
    tasks, cost = load(config), cost_model(reference_groups("cnet"))
    each = [policy_widths(["global"], task, cost, 2.0, "params")["global"] for task in tasks]
    ratios = np.divide(each, tasks[0].groups.sizes).mean(0)
    rows = read([config.out])
    assert rows[0].key.widths == solve(cost, scale_curve(ratios.tolist()), 2.0).widths
    measured = {row.key.widths for row in rows if row.source == "choice"}
    assert rows[0].key.widths in measured  # the start is among what is chosen from
    made = searched.provenance
    assert made.agent.startswith("cma-es, from global, ")
    words = shlex.split(made.command)
    assert words[words.index("--from") + 1] == "global"
    assert "from global" in (config.out / "report.md").read_text()


def test_finalists_are_chosen_after_a_distillation_with_channels_of_its_own(config, searched):
    rows = [row for row in read([config.out]) if row.source == "choice"]
    by = {}
    for row in rows:
        by.setdefault(row.key.fidelity.partition(",")[0], []).append(row.key)
    assert list(by) == ["recalibration", "distillation", "fine-tune"]
    counts = [len({key.widths for key in keys}) for keys in by.values()]
    assert counts[0] > counts[1] >= counts[2] == config.finalists
    seeds = [{key.seed for key in keys} for keys in by.values()]
    assert not seeds[0] & seeds[1]
    assert not seeds[1] & seeds[2]
    assert tuple(searched.kept.values()) in {key.widths for key in by["fine-tune"]}


def test_another_start_does_not_resume(config, searched):
    del searched
    again = dataclasses.replace(config, resume=True)
    count = len(read([config.out]))
    assert search(again).provenance.episodes == 16
    assert len(read([config.out])) == count
    for other, told in (("equal", "from equal"), (None, "from none")):
        with pytest.raises(ZooError, match=f"started from global, not {told}"):
            search(dataclasses.replace(again, start=other))


def test_a_cold_search_is_not_resumed_from_a_start(config, tmp_path):
    cold = dataclasses.replace(config, out=tmp_path, start=None, distill_steps=None, episodes=8)
    search(cold)
    with pytest.raises(ZooError, match="started from no profile, not from global"):
        search(dataclasses.replace(cold, start="global", resume=True))


def test_profiles_of_other_factors_are_scaled(config):
    tasks, cost = load(config), cost_model(reference_groups("cnet"))
    profile = get_profile("bundled:cnet/params-cf4")
    at_two = start_at("bundled:cnet/params-cf4", "cnet", tasks, cost, 2.0, "macs").ratios
    assert cost.factor(solve(cost, scale_curve(at_two), 2.0, "macs").widths, "macs") == (
        pytest.approx(2.0, rel=0.02)
    )
    same = start_at("bundled:cnet/params-cf4", "cnet", tasks, cost, 4.0, "params").ratios
    widths = solve(cost, scale_curve(same), 4.0).widths
    assert np.abs(np.subtract(widths, tuple(profile.kept.values()))).max() <= 1
    equal = start_at("equal", "cnet", tasks, cost, 2.0, "params")
    kept = policy_solution("equal", cost, 2.0).widths
    assert equal.ratios == tuple(w / size for w, size in zip(kept, cost.sizes, strict=True))


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("globl", r"'globl'. Did you mean 'global'\? Known: .*equal.*knapsack.*bundled:"),
        (
            "bundled:resnet20-16/params-cf4",
            r"for resnet20-16, not cnet. Known: equal.*bundled:cnet",
        ),
        ("bundled:cnet/params-cf5", r"Unknown profile .*Known: bundled:cnet"),
        ("global-bn", r"gives .*no profile at 2x params. Known: equal"),
        ("file:nowhere.json", "does not exist"),
    ],
)
def test_what_is_no_start_is_refused_and_leaves_the_folder_free(config, tmp_path, reference, told):
    with pytest.raises(ZooError, match=told):
        search(dataclasses.replace(config, out=tmp_path, start=reference))
    assert not (tmp_path / "search.json").exists()


def test_the_flag_is_from():
    import tyro

    flags = ["--arch", "cnet", "--tasks", "a", "--out", "o", "--from", "bundled:cnet/params-cf4"]
    assert tyro.cli(SearchConfig, args=flags).start == "bundled:cnet/params-cf4"


def test_a_search_starts_from_a_learned_policy_and_from_the_best(tmp_path):
    config = tiny_search(tmp_path)
    tasks, cost = load(config), cost_model(reference_groups("cnet"))
    for cf, name in ((2.0, "learned"), (1.5, "global-fisher-per-cost")):
        first, known = (
            start_at(start, "cnet", tasks, cost, cf, "params") for start in ("best", name)
        )
        assert first == known
    silent = {
        f"{layer}.{kind}": np.zeros(shape, np.float32)
        for layer, shapes in enumerate((((4, len(FEATURES)), 4), ((4, 4), 4), ((1, 4), 1)))
        for kind, shape in zip(("weight", "bias"), shapes, strict=True)
    }
    training = Training(FEATURES, {}, (), (), (), ("macs",), (2.0,), 0, "", "")
    LearnedPolicy(silent, training).write(tmp_path / "policy")
    name = f"learned:{tmp_path / 'policy'}"
    learned, ranked = (start_at(n, "cnet", tasks, cost, 2.0, "macs") for n in (name, "global"))
    assert learned.ratios == ranked.ratios
