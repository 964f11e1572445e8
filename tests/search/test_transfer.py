"""One policy for several networks: it starts at zero and learns what the reward tells it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from zoo.data.datasets import ImageSet
from zoo.errors import ZooError
from zoo.planning.decisions import Decisions
from zoo.planning.learned import learned_policy, play
from zoo.registry.store import stored_groups
from zoo.search.tasks import Candidate, Task
from zoo.search.transfer import Case, Played, TransferEnv, TransferSettings, learn
from zoo.spec.cost import cost_model

ARCHS = ("resnet20-16", "cnet", "resnet20")


def case(arch: str, images: ImageSet, cf: float = 4.0, scores: bool = False) -> Case:
    groups = stored_groups(arch)
    assert groups is not None
    task = Task(arch, arch, nn.Identity(), groups, images, images, 0.8, "0", ())
    rng = np.random.default_rng(0)
    told = [list(rng.exponential(1, size)) for size in groups.sizes] if scores else None
    return Case(arch, task, cost_model(groups), "macs", cf, told, 1000)


def late(candidates: Sequence[Candidate]) -> list[float]:
    """A world in which the last group alone matters."""
    return [0.3 + 0.4 * each.widths[-1] / each.task.groups.sizes[-1] for each in candidates]


def learnt(images: ImageSet, **changes: object) -> tuple[list[Played], object]:
    played: list[Played] = []
    cases = [case(arch, images, scores=scores) for arch in ARCHS[:2] for scores in (False, True)]
    settings = TransferSettings(**{"episodes": 200, "round_steps": 128, "lr": 3e-3, **changes})
    policy = learn(
        cases, late, settings, fidelity="a formula", command="none", on_episode=played.append
    )
    return played, policy


def test_it_learns_a_habit_that_holds_on_a_network_it_never_saw(
    toy_images: ImageSet, tmp_path: Path
) -> None:
    played, policy = learnt(toy_images, episodes=400)
    rewards = [each.reward for each in played]
    assert statistics.mean(rewards[-80:]) > statistics.mean(rewards[:80]) + 0.05
    policy.write(tmp_path)
    unseen = case("resnet20", toy_images)
    decisions = Decisions(unseen.task.groups, unseen.cost, unseen.cf, unseen.metric)
    found = play(learned_policy(f"learned:{tmp_path}"), decisions)
    assert found.widths[-1] > decisions.known.widths[-1]
    assert found.got == pytest.approx(4, rel=0.01)


def test_it_begins_at_the_known_policy(toy_images: ImageSet) -> None:
    played, policy = learnt(toy_images, episodes=0)
    assert not played
    for scores in (False, True):
        own = case("resnet20", toy_images, scores=scores)
        decisions = Decisions(own.task.groups, own.cost, own.cf, own.metric, scores=own.scores)
        assert play(policy, decisions) == decisions.known


def test_the_same_seed_learns_the_same_and_random_states_are_kept(toy_images: ImageSet) -> None:
    state = torch.get_rng_state()
    (one, policy), (two, same), (three, _) = (
        learnt(toy_images, episodes=12, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert [each.actions for each in one] == [each.actions for each in two]
    assert [each.actions for each in one] != [each.actions for each in three]
    for name, tensor in policy.tensors.items():
        assert np.array_equal(tensor, same.tensors[name])


def test_every_case_is_played_once_before_any_is_played_again(toy_images: ImageSet) -> None:
    cases = [case(arch, toy_images, cf) for arch in ARCHS for cf in (2.0, 4.0)]
    env = TransferEnv(cases, late)
    seen = []
    for _ in range(2 * len(cases)):
        env.reset()
        seen.append(id(env._case))
        while not env._decisions.finished:
            env.step(np.zeros(1))
    assert set(seen[: len(cases)]) == set(seen[len(cases) :]) == {id(each) for each in cases}


def test_the_reward_is_paired_and_on_the_networks_own_scale(toy_images: ImageSet) -> None:
    asked: list[Candidate] = []

    def spy(candidates: Sequence[Candidate]) -> list[float]:
        asked.extend(candidates)
        return late(candidates)

    env = TransferEnv([case("cnet", toy_images)], spy)
    env.reset()
    finished, reward = False, 0.0
    while not finished:
        _, reward, finished, _, _ = env.step(np.ones(1) * 0.5 * (len(asked) + 1))
    known, found = asked
    assert (known.seed, known.task) == (found.seed, found.task)
    low, high = late(asked)
    chance = 1 / len(toy_images.classes)
    assert reward == pytest.approx((high - low) / (0.8 - chance))


def test_nothing_to_learn_from_is_an_error() -> None:
    with pytest.raises(ZooError, match="No case to learn from"):
        TransferEnv([], late)
