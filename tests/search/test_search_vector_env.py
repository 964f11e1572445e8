"""Many environments in lockstep play what one would have played alone."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from gymnasium.wrappers.vector import RecordEpisodeStatistics
from test_search_env import CHOICES, LAYERS, TASKS, accuracies, make, run

from zoo.errors import ZooError
from zoo.search.vector_env import PruningVectorEnv, play

EPISODES = 12


class Counting:
    """`accuracies`, with how many candidates each call had."""

    def __init__(self):
        self.calls = []

    def __call__(self, candidates):
        self.calls.append(len(candidates))
        return accuracies(candidates)


def test_gymnasiums_wrappers_apply():
    env = RecordEpisodeStatistics(PruningVectorEnv(make, 3))
    env.reset(seed=0)
    for _ in range(LAYERS):
        _, rewards, _, _, infos = env.step(np.zeros((3, 1), np.float32))
    assert infos["episode"]["l"].tolist() == [LAYERS] * 3
    assert infos["episode"]["r"] == pytest.approx(rewards)
    assert [episode["reward"] for episode in infos["played"]] == rewards.tolist()


def actions_of(number):
    """The actions of episode `number`, the same whoever plays it."""
    return np.random.default_rng(number).uniform(-1, 1, LAYERS).astype(np.float32)


def together(env, rounds, first=0):
    """Every observation of every episode, in order, and the infos."""
    observations, _ = env.reset(seed=first)
    seen, infos = [], []
    for start in range(first, first + rounds * env.num_envs, env.num_envs):
        actions = np.stack([actions_of(start + i) for i in range(env.num_envs)])
        steps = [observations]
        for step in range(LAYERS):
            observations, rewards, ended, cut_short, info = env.step(actions[:, step : step + 1])
            assert env.observation_space.contains(observations)
            assert not cut_short.any()
            assert ended.tolist() == [step == LAYERS - 1] * env.num_envs
            assert rewards.tolist() == [
                episode.get("reward", 0.0) for episode in info.get("played", [{}] * env.num_envs)
            ]
            steps.append(observations)
        steps[-1] = info["final_obs"]
        seen += list(np.stack(steps, axis=1))
        infos += list(info["played"])
    return seen, infos


def alone(env, count, first=0):
    seen, infos = [], []
    for number in range(first, first + count):
        start, _ = env.reset(seed=number)
        steps = list(run(env, actions_of(number), seed=number))
        seen.append(np.stack([start, *(observation for observation, *_ in steps)]))
        infos.append(steps[-1][-1])
    return seen, infos


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("num_envs", [1, 3, 4])
def test_together_and_alone_are_the_same_to_the_bit_in_one_evaluation_a_round(choices, num_envs):
    evaluate = Counting()
    env = PruningVectorEnv(lambda: make(evaluate=evaluate, **choices), num_envs)
    seen, infos = together(env, EPISODES // num_envs)
    assert evaluate.calls == [num_envs] * (EPISODES // num_envs)
    alone_seen, alone_infos = alone(make(**choices), EPISODES)
    assert infos == alone_infos
    assert (np.array(seen) == np.array(alone_seen)).all()


def test_the_queue_goes_round_whatever_the_number_of_environments():
    for num_envs in (1, 2, 5):
        env = PruningVectorEnv(make, num_envs)
        _, infos = together(env, 10 // num_envs)
        assert [info["task"] for info in infos] == ["a", "bb", "ccc"] * 3 + ["a"]
        _, infos = together(env, 10 // num_envs, first=2)
        assert [info["task"] for info in infos][:3] == ["ccc", "a", "bb"]


def test_reset_goes_on_and_its_seed_rewinds():
    env = PruningVectorEnv(make, 2)

    def names():
        for _ in range(LAYERS):
            *_, info = env.step(np.zeros((2, 1), dtype=np.float32))
        return [episode["task"] for episode in info["played"]]

    env.reset()
    assert names() == ["a", "bb"]
    env.reset()  # episodes 2 and 3 have begun, and are given up
    assert names() == ["bb", "ccc"]
    env.reset(seed=0)
    assert names() == ["a", "bb"]


def test_given_keep_ratios_play_as_stepping_does_and_leave_running_episodes_alone():
    evaluate = Counting()
    env = PruningVectorEnv(lambda: make(cf=(2.0, 4.0), projection="bound", evaluate=evaluate), 4)
    _, infos = together(env, 3)
    env.reset(seed=0)
    actions = np.full((4, 1), 0.4, dtype=np.float32)
    env.step(actions)
    evaluate.calls.clear()
    betas = np.array([info["actions"] for info in infos])
    assert play(env, betas, range(12)) == infos
    assert evaluate.calls == [12]
    assert play(env, betas[[7, 1]], [7, 1]) == [infos[7], infos[1]]
    after, *_ = env.step(actions)
    env.reset(seed=0)
    env.step(actions)
    undisturbed, *_ = env.step(actions)
    assert (after == undisturbed).all()


def test_given_keep_ratios_are_brought_into_the_range_of_actions():
    env = PruningVectorEnv(make, 1)
    [info] = play(env, np.array([[-3.0, 0.05, 0.5, 1.0, 1.5, 0.1]]), [len(TASKS) + 1])
    assert info["actions"] == (0.1, 0.1, 0.5, 1.0, 1.0, 0.1)
    assert info["task"] == "bb"


def test_what_cannot_be_played_is_refused():
    env = PruningVectorEnv(make, 1)
    with pytest.raises(ZooError, match=r"shape \(2, 6\), got shape \(2, 5\)"):
        play(env, np.full((2, 5), 0.5), [0, 1])
    with pytest.raises(ZooError, match="numbers"):
        play(env, np.full((1, 6), np.nan), [0])
    env.reset()
    with pytest.raises(ZooError, match=r"actions must have shape \(1, 1\), got \(2, 1\)"):
        env.step(np.zeros((2, 1)))
    with pytest.raises(ZooError, match="num_envs must be an integer of at least 1"):
        PruningVectorEnv(make, 0)
