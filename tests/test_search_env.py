"""The environment and PPO on a synthetic accuracy: no network, a known best profile."""

from __future__ import annotations

import math
import statistics
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from zoo.cost import cost_model
from zoo.data import ImageSet
from zoo.errors import FactorError, ZooError
from zoo.groups import ChannelGroups, Group, Slot
from zoo.search.evaluation import Task
from zoo.solver import FLOOR, round_widths, scale_curve, solve

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("stable_baselines3")

from zoo.search.agents.ppo import train_ppo  # noqa: E402
from zoo.search.env import PruningEnv, keep_ratio  # noqa: E402

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


def accuracy(_task, widths, seed):
    """Falls with the distance from `BEST`, with a little noise from the channels."""
    distance = statistics.mean((w / WIDTH - b) ** 2 for w, b in zip(widths, BEST, strict=True))
    return BASE * math.exp(-4 * distance) - 0.01 * (seed % 10) / 10


def make(**options) -> PruningEnv:
    settings = {"tasks": TASKS, "groups": chain(), "cf": 4.0, "evaluate": accuracy} | options
    return PruningEnv(**settings)


def play(env, actions, **reset):
    env.reset(**reset)
    for action in actions:
        observation, reward, done, _, info = env.step(np.array([action], dtype=np.float32))
        assert env.observation_space.contains(observation)
        yield reward, done, info


def test_gymnasium_accepts_the_environment():
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make(
        "zoo.search.env:zoo/Pruning-v0",
        tasks=TASKS, groups=chain(), cf=4.0, evaluate=accuracy,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped, skip_render_check=True)


def test_the_reward_comes_once_at_the_end_and_is_the_gaussian_one():
    env = make(projection="none")
    steps = list(play(env, [-0.5] * LAYERS, seed=0))
    assert [reward for reward, _, _ in steps[:-1]] == [0.0] * (LAYERS - 1)
    assert [done for _, done, _ in steps] == [False] * (LAYERS - 1) + [True]
    reward, _, info = steps[-1]
    widths = round_widths(chain().sizes, [keep_ratio(-0.5)] * LAYERS)
    factor = cost_model(chain()).factor(widths, "params")
    assert info["widths"] == widths
    assert info["factor"] == pytest.approx(factor)
    gap = math.exp(-((factor - 4) ** 2) / (2 * 0.4**2))
    assert reward == info["reward"] == pytest.approx(info["accuracy"] / BASE * gap)


@pytest.mark.parametrize("metric", ["params", "macs"])
@pytest.mark.parametrize("cf", [2.0, 6.0])
def test_scale_projection_meets_the_factor_whatever_the_actions(metric, cf):
    env = make(metric=metric, cf=cf)
    for seed in range(5):
        actions = np.random.default_rng(seed).uniform(-1.2, 1.2, LAYERS)
        *_, (_, _, info) = play(env, actions, seed=seed)
        assert info["factor"] == pytest.approx(cf, rel=0.03)  # one unit of 32
        assert info["factor"] == cost_model(chain()).factor(info["widths"], metric)


def test_seeds_fix_the_place_in_the_queue_and_the_channels():
    env = make()

    def episodes(count, seed):
        names = [env.reset(seed=seed)[1]["task"]]
        return names + [env.reset()[1]["task"] for _ in range(count - 1)]

    assert episodes(4, 0) == ["a", "bb", "ccc", "a"]
    assert episodes(3, 5) == ["ccc", "a", "bb"]
    assert episodes(3, 5) == ["ccc", "a", "bb"]
    seeds = [list(play(env, [0.0] * LAYERS, seed=s))[-1][2]["channel_seed"] for s in (3, 3, 4)]
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


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(FactorError, match="reaches"):
        make(cf=1000.0)
    with pytest.raises(ZooError, match="one architecture"):
        make(tasks=(TASKS[0], task("narrow", 16)))
    with pytest.raises(ZooError, match="reference"):
        make(groups=chain(16))
    with pytest.raises(ZooError, match="at least one task"):
        make(tasks=())
    with pytest.raises(ZooError, match="Did you mean 'scale'"):
        make(projection="scales")


def learn(episodes, **options):
    rewards, found = [], []

    def keep(info):
        rewards.append(info["reward"])
        found.append(info["widths"])

    policy = train_ppo(make, episodes, seed=0, on_episode=keep, **options)
    return policy, rewards, found


def test_ppo_learns_and_beats_equal_and_random_search():
    policy, rewards, _ = learn(240)
    assert len(rewards) == 240
    assert statistics.mean(rewards[-40:]) > statistics.mean(rewards[:40])
    model = cost_model(chain())
    rng = np.random.default_rng(0)
    rivals = [solve(model, scale_curve(rng.uniform(0.3, 0.9, LAYERS)), 4.0) for _ in range(240)]
    random = max(accuracy(None, rival.widths, 0) for rival in rivals)
    equal = accuracy(None, solve(model, scale_curve([1.0] * LAYERS), 4.0).widths, 0)
    env = make()
    for position in range(len(TASKS)):
        observation, _ = env.reset(seed=position)
        done = False
        while not done:
            observation, _, done, _, info = env.step(policy(observation))
        assert accuracy(None, info["widths"], 0) > max(random, equal)


def test_ppo_repeats_itself_and_leaves_the_random_state_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    _, first, _ = learn(16)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    _, second, _ = learn(16)
    assert first == second


def test_ppo_stops_when_it_is_told_and_on_interruption():
    count = iter(range(100))
    _, rewards, _ = learn(64, stop=lambda: next(count) == 4)
    assert len(rewards) == 5

    def interrupted(_task, widths, seed):
        if next(count) > 20:
            raise KeyboardInterrupt
        return accuracy(_task, widths, seed)

    played = []
    policy = train_ppo(partial(make, evaluate=interrupted), 64, seed=0, on_episode=played.append)
    assert 0 < len(played) < 64
    observation, _ = make().reset(seed=0)
    assert policy(observation).shape == (1,)
