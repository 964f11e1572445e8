"""The environment on a synthetic accuracy: no network, a known best profile."""

from __future__ import annotations

import math
import statistics
import warnings

import numpy as np
import pytest
import torch

from zoo.data.datasets import ImageSet
from zoo.errors import FactorError, ZooError
from zoo.planning.solver import FLOOR, round_widths, scale_curve, solve
from zoo.search.reward import REWARDS, Outcome
from zoo.search.tasks import Candidate, Task, plan_of
from zoo.spec.cost import Conditions, LatencyTable, LayerTimes, cost_model
from zoo.spec.groups import ChannelGroups, Group, Slot

gymnasium = pytest.importorskip("gymnasium")

from zoo.search.env import EnvSettings, PruningEnv, keep_ratio  # noqa: E402

LAYERS, WIDTH, BASE = 6, 32, 0.8


def chain(width: int = WIDTH) -> ChannelGroups:
    """Six 3x3 convolutions in a row and a dense layer, as cnet has them."""
    shapes, positions, groups = {}, {}, []
    for n in range(LAYERS):
        shapes[f"conv{n}.weight"] = (width, 3 if n == 0 else width, 3, 3)
        positions[f"conv{n}.weight"] = 4 ** (5 - n // 2)
        following = Slot("fc.weight", 1) if n == LAYERS - 1 else Slot(f"conv{n + 1}.weight", 1)
        groups.append(Group(f"conv{n}", width, (Slot(f"conv{n}.weight", 0), following)))
    shapes["fc.weight"] = (10, width)
    positions["fc.weight"] = 1
    return ChannelGroups(tuple(groups), shapes, (), positions, image_size=32)


def timed():
    """The costs of `chain` with made-up times, which grow with outputs times inputs."""
    grid = (4, 16, 32)
    layers = []
    for n in range(LAYERS):
        inputs = (3,) if n == 0 else grid
        ms = tuple(tuple(0.1 + (n + 1) * o * i / 4096 for i in inputs) for o in grid)
        layers.append(LayerTimes(f"conv{n}.weight", grid, inputs, ms))
    conditions = Conditions("made up", torch.__version__, 1, "float32", 1, 32)
    return cost_model(chain(), LatencyTable(conditions, tuple(layers), 0.05))


def task(name: str, width: int = WIDTH) -> Task:
    nothing = ImageSet(
        "nothing", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1).long(),
        ("a", "b"), (0.5,) * 3, (0.5,) * 3,
    )  # fmt: skip
    rng = np.random.default_rng(len(name))
    features = tuple(rng.exponential(size=width) for _ in range(LAYERS))
    return Task(
        name, name, torch.nn.Identity(), chain(width), nothing, nothing, BASE, "digest", features
    )


TASKS = (task("a"), task("bb"), task("ccc"))
BEST = solve(cost_model(chain()), scale_curve([0.9, 0.3, 0.8, 0.25, 0.9, 0.6]), 4.0).keep_ratios


def accuracies(candidates):
    """Fall with the distance from `BEST`, and a little with the task and its channels."""
    return [accuracy(c) for c in candidates]


def accuracy(candidate):
    widths = zip(candidate.widths, BEST, strict=True)
    distance = statistics.mean((width / WIDTH - best) ** 2 for width, best in widths)
    luck = candidate.seed % 10 + len(candidate.task.name)
    return BASE * math.exp(-4 * distance) - 0.001 * luck


def make(cf=4.0, tasks=TASKS, groups=None, evaluate=accuracies, cost=None, live=None, **choices):
    settings = EnvSettings(**choices)
    groups = groups or chain()
    return PruningEnv(tasks, groups, cf, evaluate, settings, cost=cost, live_features=live)


def masked_features(candidate):
    """Live features of a network that pruning does not change."""
    kept = plan_of(candidate).kept
    vectors = []
    for name, dense in zip(candidate.task.groups.names, candidate.task.features, strict=True):
        vector = np.zeros_like(dense)
        vector[list(kept[name])] = dense[list(kept[name])]
        vectors.append(vector)
    return tuple(vectors)


def run(env, actions, **reset):
    """The steps of one episode: (observation, reward, done, info)."""
    env.reset(**reset)
    for action in actions:
        observation, reward, done, _, info = env.step(np.array([action], dtype=np.float32))
        assert env.observation_space.contains(observation)
        yield observation, reward, done, info


def final(env, actions, **reset):
    return list(run(env, actions, **reset))[-1][-1]


def random_actions(seed):
    return np.random.default_rng(seed).uniform(-1.2, 1.2, LAYERS)


CHOICES = [
    {},
    {"projection": "bound", "observation": "raw", "cf": (2.0, 4.0), "reward": "hyperbolic"},
    {"projection": "none", "features": "live", "live": masked_features, "reward": "n2n"},
]


@pytest.mark.parametrize("choices", CHOICES)
def test_gymnasium_and_stable_baselines_accept_the_environment(choices):
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(**choices), skip_render_check=True)
        checker = pytest.importorskip("stable_baselines3.common.env_checker")
        checker.check_env(make(**choices))


def test_gymnasium_makes_the_environment_by_its_name():
    env = gymnasium.make(
        "zoo.search.env:zoo/Pruning-v0",
        tasks=TASKS, groups=chain(), cf=4.0, evaluate=accuracies,
    )  # fmt: skip
    assert final(env, [0.0] * LAYERS, seed=1) == final(make(), [0.0] * LAYERS, seed=1)


def test_the_reward_comes_once_at_the_end_and_is_the_gaussian_one():
    env = make(projection="none")
    steps = list(run(env, [-0.5] * LAYERS, seed=0))
    assert [reward for _, reward, _, _ in steps[:-1]] == [0.0] * (LAYERS - 1)
    assert [done for _, _, done, _ in steps] == [False] * (LAYERS - 1) + [True]
    _, reward, _, info = steps[-1]
    widths = round_widths(chain().sizes, [keep_ratio(-0.5)] * LAYERS)
    factor = cost_model(chain()).factor(widths, "params")
    assert info["widths"] == widths
    assert info["factor"] == pytest.approx(factor)
    gap = math.exp(-((factor - 4) ** 2) / (2 * 0.4**2))
    assert reward == info["reward"] == pytest.approx(info["accuracy"] / BASE * gap)


@pytest.mark.parametrize("reward", REWARDS)
def test_the_reward_is_the_chosen_one_of_what_was_kept(reward):
    info = final(make(reward=reward), random_actions(0), seed=0)
    equal = solve(cost_model(chain()), scale_curve([1.0] * LAYERS), 4.0).widths
    outcome = Outcome(
        info["accuracy"],
        BASE,
        info["factor"],
        4.0,
        [width / WIDTH for width in info["widths"]],
        statistics.mean(equal) / WIDTH,
    )
    assert info["reward"] == pytest.approx(REWARDS[reward](outcome), rel=0.02)


METRICS = [("params", 2.0), ("params", 6.0), ("macs", 6.0), ("latency", 2.0)]


@pytest.mark.parametrize(("metric", "cf"), METRICS)
def test_scale_projection_meets_the_factor_whatever_the_actions(metric, cf):
    env = make(metric=metric, cf=cf, cost=timed())
    for seed in range(5):
        info = final(env, random_actions(seed), seed=seed)
        assert info["factor"] == pytest.approx(cf, rel=0.03)  # one unit of 32
        assert info["factor"] == timed().factor(info["widths"], metric)


@pytest.mark.parametrize(("metric", "cf"), METRICS)
def test_bound_projection_meets_at_least_the_factor_and_cuts_no_more_than_it_must(metric, cf):
    env, model = make(metric=metric, cf=cf, cost=timed(), projection="bound"), timed()
    floor = round_widths(chain().sizes, [FLOOR] * LAYERS)
    for seed in range(20):
        info = final(env, random_actions(seed) + 0.3, seed=seed)
        assert info["factor"] >= cf
        assert round_widths(chain().sizes, info["keep_ratios"]) == info["widths"]
        for group, (asked, got) in enumerate(
            zip(info["actions"], info["keep_ratios"], strict=True)
        ):
            assert FLOOR <= got <= asked
            if got < asked:
                wider = [*info["widths"][:group], info["widths"][group] + 1, *floor[group + 1 :]]
                assert model.factor(wider, metric) < cf


def test_bound_projection_stops_at_the_factor_from_one_side_only():
    env = make(projection="bound")
    everything = final(env, [1.0] * LAYERS, seed=0)
    assert everything["factor"] >= 4.0
    assert everything["widths"][0] == WIDTH
    assert everything["widths"][-1] < WIDTH
    nothing = final(env, [-1.0] * LAYERS, seed=0)
    assert nothing["keep_ratios"] == nothing["actions"]
    assert nothing["factor"] > 30


def test_bound_projection_shows_what_it_left_of_an_action():
    env = make(projection="bound")
    *observations, _ = (observation for observation, *_ in run(env, [1.0] * LAYERS, seed=0))
    info = final(env, [1.0] * LAYERS, seed=0)
    seen = [observation[-1] for observation in observations]
    assert seen == pytest.approx(info["keep_ratios"][:-1])
    assert min(seen) < 1


def test_seeds_fix_the_place_in_the_queue_and_the_channels():
    env = make()

    def episodes(count, seed):
        names = [env.reset(seed=seed)[1]["task"]]
        return names + [env.reset()[1]["task"] for _ in range(count - 1)]

    assert episodes(4, 0) == ["a", "bb", "ccc", "a"]
    assert episodes(3, 5) == ["ccc", "a", "bb"]
    assert episodes(3, 5) == ["ccc", "a", "bb"]
    seeds = [final(env, [0.0] * LAYERS, seed=s)["channel_seed"] for s in (3, 3, 4)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_the_observation_tells_what_was_pruned():
    env = make(projection="none")
    first, _ = env.reset(seed=0)
    kept, *_ = env.step(np.array([1.0], dtype=np.float32))
    assert kept[-2] == 0
    assert kept[-1] == 1
    env.reset(seed=0)
    pruned, *_ = env.step(np.array([-1.0], dtype=np.float32))
    assert pruned[-1] == pytest.approx(FLOOR)
    assert 0 < pruned[-2] < 1
    summary = slice(LAYERS + 4, -2)
    assert (pruned[summary] <= kept[summary]).all()
    assert (pruned[summary][:7] == 0).all()
    assert kept[summary][6] > 0
    assert first[:LAYERS].argmax() == 0
    assert kept[:LAYERS].argmax() == 1


def test_the_raw_observation_shows_the_features_of_the_channels_that_are_evaluated():
    steps = list(run(make(observation="raw", projection="none"), random_actions(1), seed=2))
    seen, info = [observation[LAYERS + 4 : -2] for observation, *_ in steps], steps[-1][-1]
    kept = plan_of(Candidate(TASKS[2], info["widths"], info["channel_seed"])).kept
    for group, (name, view) in enumerate(zip(chain().names, seen, strict=True)):
        assert tuple(view.nonzero()[0]) == kept[name]
        dense = TASKS[2].features[group]
        assert view[list(kept[name])] == pytest.approx(dense[list(kept[name])] / dense.max())


def test_raw_features_of_small_groups_are_padded():
    from zoo.search.observation import pad

    features = (np.array([2.0, 1.0]), np.arange(5.0))
    assert pad(features, 0, np.array([True, True])).tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]


def test_live_features_are_asked_of_the_network_as_pruned_before_every_decision_but_the_first():
    asked = []

    def live(candidate):
        asked.append(candidate)
        return masked_features(candidate)

    info = final(make(features="live", live=live, projection="none"), random_actions(3), seed=1)
    assert [candidate.widths for candidate in asked] == [
        (*info["widths"][:step], *[WIDTH] * (LAYERS - step)) for step in range(1, LAYERS)
    ]
    assert {(c.task.name, c.seed) for c in asked} == {("bb", info["channel_seed"])}


@pytest.mark.parametrize("observation", ["summary", "raw"])
def test_live_features_are_static_ones_until_something_is_pruned(observation):
    live = make(observation=observation, features="live", live=masked_features)
    static = make(observation=observation)
    pairs = zip(run(live, [1.0] * LAYERS), run(static, [1.0] * LAYERS), strict=True)
    for (left, *_), (right, *_) in pairs:
        assert (left == right).all()


@pytest.mark.parametrize("observation", ["summary", "raw"])
def test_live_features_show_what_pruning_did_to_what_was_kept(observation):
    def live(candidate):
        return tuple(np.sqrt(vector) for vector in masked_features(candidate))

    actions = [0.0] * LAYERS
    shown = make(observation=observation, features="live", live=live)
    static = make(observation=observation)
    pairs = zip(run(shown, actions), run(static, actions), strict=True)
    for (left, *_), (right, *_) in list(pairs)[:-1]:
        assert (left != right).any()


def test_several_factors_are_asked_for_in_turn_and_seen():
    env, alone = make(cf=(2.0, 6.0)), make(cf=6.0)
    played = [(entry.task.name, entry.cf) for entry in env.queue]
    assert played == [(name, cf) for name in ("a", "bb", "ccc") for cf in (2.0, 6.0)]
    first, info = env.reset(seed=0)
    second, other = env.reset()
    assert (info, other) == ({"task": "a", "cf": 2.0}, {"task": "a", "cf": 6.0})
    assert (first[:-1] == second[:-1]).all()
    assert 0 < first[-1] < second[-1] < 1
    assert first[-1] / second[-1] == pytest.approx(math.log(2) / math.log(6))
    assert len(first) == len(alone.reset(seed=0)[0]) + 1
    low, high = (final(env, random_actions(0), seed=seed) for seed in (2, 3))
    assert low["factor"] == pytest.approx(2.0, rel=0.03)
    assert high == final(alone, random_actions(0), seed=1)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(FactorError, match="reaches"):
        make(cf=1000.0)
    with pytest.raises(FactorError, match="reaches"):
        make(cf=(2.0, 1000.0))
    with pytest.raises(ZooError, match="at least one compression factor"):
        make(cf=())
    with pytest.raises(ZooError, match="one architecture"):
        make(tasks=(TASKS[0], task("narrow", 16)))
    with pytest.raises(ZooError, match="reference"):
        make(groups=chain(16))
    with pytest.raises(ZooError, match="another network"):
        make(cost=cost_model(chain(16)))
    with pytest.raises(ZooError, match="at least one task"):
        make(tasks=())
    with pytest.raises(ZooError, match="was not measured"):
        make(metric="latency")
    with pytest.raises(ZooError, match="live_features"):
        make(features="live")


@pytest.mark.parametrize(
    ("choice", "name", "meant"),
    [
        ("projection", "scales", "scale"),
        ("reward", "gausian", "gaussian"),
        ("observation", "row", "raw"),
        ("features", "alive", "live"),
        ("metric", "mac", "macs"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(choice, name, meant):
    with pytest.raises(ZooError, match=f"Unknown {choice}.*Did you mean '{meant}'"):
        make(**{choice: name})


def test_what_is_no_number_stops_the_episode():
    with pytest.raises(ZooError, match="accuracy of nan"):
        final(make(evaluate=lambda candidates: [math.nan] * len(candidates)), [0.0] * LAYERS)
    with pytest.raises(ZooError, match="diverged"):
        final(make(), [math.nan] * LAYERS)
