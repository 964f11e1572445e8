"""The agents on a made-up accuracy over real channel groups, whose best profile is known."""

from __future__ import annotations

import random
import statistics
from functools import cache

import numpy as np
import pytest
import torch

from zoo.errors import ZooError
from zoo.planning.solver import FLOOR, round_widths, scale_curve, solve
from zoo.search.agents import AGENTS, SCREENED, agent
from zoo.spec.cost import cost_model
from zoo.tracing.known_groups import reference_groups

pytest.importorskip("gymnasium")
pytest.importorskip("stable_baselines3")
pytest.importorskip("cmaes")
pytest.importorskip("pymoo")

from synthetic import Synthetic

from zoo.search.agents.gnn import Actor, Critic, train_gnn
from zoo.search.agents.graphs import Architecture
from zoo.search.env import PruningEnv
from zoo.search.vector_env import PruningVectorEnv

EPISODES = 320

SHARES = {
    "ppo": 0.97,
    "ddpg": 0.90,
    "gnn": 0.96,
    "random": 0.75,
    "cma-es": 0.97,
    "genetic": 0.94,
    "swarm": 0.95,
    "annealing": 0.93,
}
"""Of the optimum that each agent must propose after `EPISODES` evaluations."""

LEARNING = [
    pytest.param(name, seed, marks=pytest.mark.slow if name in ("ppo", "ddpg", "gnn") else ())
    for name in AGENTS
    for seed in ((0,) if name in ("ppo", "ddpg", "gnn") else (0, 1, 2, 3))
]


@cache
def problem(seed: int = 0) -> Synthetic:
    return Synthetic(seed)


def search(name: str, episodes: int, problem: Synthetic, seed: int = 0, **options):
    """The episodes that were played, and those that the agent proposes."""
    played = []
    proposed = agent(name)(problem.env(), episodes, seed=seed, on_episode=played.append, **options)
    return played, proposed


@cache
def learnt(name: str, seed: int):
    return search(name, EPISODES, problem(seed), seed)


def mean_reward(episodes) -> float:
    return statistics.mean(episode["reward"] for episode in episodes)


def proposal(name: str, seed: int) -> float:
    """The share of the optimum that an agent proposes, over the queue."""
    return mean_reward(learnt(name, seed)[1]) / problem(seed).optimum


@pytest.mark.parametrize("seed", [0, 1])
def test_the_known_optimum_is_one(seed):
    known, rng = problem(seed), np.random.default_rng(seed)
    for _ in range(3):
        np.testing.assert_allclose(
            known.descend(rng.uniform(FLOOR, 1, len(known.best))), known.best, atol=2e-3
        )
    model = cost_model(known.groups)
    rounded = solve(model, scale_curve(known.best), known.cf)
    assert known.share(rounded.widths) == pytest.approx(known.optimum, rel=5e-3)
    near = known.best * np.exp(rng.normal(0, 0.1, (200, len(known.best))))
    for row in [*near, *rng.uniform(0.1, 1, (200, len(known.best)))]:
        widths = solve(model, scale_curve(row), known.cf).widths
        assert known.share(widths) < known.optimum * 1.004  # the solver's tolerance is 1 %
    assert known.equal < 0.7 * known.optimum


@pytest.mark.parametrize(("name", "seed"), LEARNING)
def test_agents_come_near_the_optimum_and_beat_random_search(name, seed):
    played, proposed = learnt(name, seed)
    assert len(played) == EPISODES
    assert proposal(name, seed) > SHARES[name]
    assert name == "random" or proposal(name, seed) > proposal("random", seed)
    assert [episode["task"] for episode in proposed] == ["base-0", "base-1"]
    for episode in (*played, *proposed):
        assert episode["factor"] == pytest.approx(4.0, rel=0.011)


@pytest.mark.parametrize("name", AGENTS)
def test_a_seed_fixes_the_episodes_and_the_random_state_is_kept(name):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(runs))
        np.random.seed(len(runs))
        before = states()
        runs.append(search(name, 32, problem(), seed))
        assert states() == before
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


@pytest.mark.parametrize("name", AGENTS)
def test_episodes_are_evaluated_together_and_reported_in_order(name):
    known, calls = problem(), []

    def evaluate(candidates):
        calls.append(candidates)
        return known.evaluate(candidates)

    env = PruningVectorEnv(lambda: PruningEnv(known.tasks, known.groups, 4.0, evaluate), 8)
    played = []
    proposed = agent(name)(env, 40, seed=0, on_episode=played.append)
    assert len(played) == 40
    assert min(len(call) for call in calls[:2]) >= 8
    evaluated = [c.widths for call in calls for c in call]
    assert [episode["widths"] for episode in played] == evaluated[:40]
    assert [episode["task"] for episode in played] == ["base-0", "base-1"] * 20
    assert {episode["widths"] for episode in proposed} <= set(evaluated)


@pytest.mark.parametrize("name", AGENTS)
def test_every_entry_of_the_queue_gets_a_proposal_at_its_own_factor(name):
    known, played = problem(), []
    env = PruningVectorEnv(
        lambda: PruningEnv(known.tasks, known.groups, (2.0, 4.0, 6.0), known.evaluate), 4
    )
    proposed = agent(name)(env, 48, seed=0, on_episode=played.append)
    assert [(e["task"], e["cf"]) for e in proposed] == [(e.task.name, e.cf) for e in env.queue]
    for episode in proposed:
        assert episode["factor"] == pytest.approx(episode["cf"], rel=0.02)
    assert len(played) == 48


@pytest.mark.parametrize("name", AGENTS)
def test_stop_ends_the_search_after_a_batch_and_it_still_proposes(name):
    asked = []

    def stop():
        asked.append(len(played))
        return len(asked) == 2

    played = []
    proposed = agent(name)(problem().env(), 320, seed=0, on_episode=played.append, stop=stop)
    assert len(asked) == 2
    assert asked[1] == len(played) < 320
    assert len(proposed) == 2


@pytest.mark.parametrize("name", AGENTS)
def test_an_interruption_keeps_what_was_learnt(name):
    known, calls = problem(), []

    def evaluate(candidates):
        calls.append(len(candidates))
        if len(calls) == 14:
            raise KeyboardInterrupt
        return known.evaluate(candidates)

    env = PruningVectorEnv(lambda: PruningEnv(known.tasks, known.groups, 4.0, evaluate), 8)
    played = []
    proposed = agent(name)(env, EPISODES, seed=0, on_episode=played.append)
    assert len(played) == sum(calls[:13]) < EPISODES
    assert played == learnt(name, 0)[0][: len(played)]
    _, untrained = search(name, 0, known)
    assert len(proposed) == len(untrained) == 2
    assert mean_reward(proposed) > mean_reward(untrained)


@pytest.mark.parametrize("name", SCREENED)
def test_a_surrogate_screens_proposals_after_the_first_profiles(name):
    known = problem()
    plain, _ = search(name, 192, known, 1)
    screened, proposed = search(name, 192, known, 1, screen=4)
    count = 2 * 32  # each profile is played on two tasks
    assert screened[:count] == plain[:count]
    assert len(screened) == len(plain)
    assert mean_reward(screened[count : 2 * count]) > mean_reward(plain[count : 2 * count])
    assert mean_reward(proposed) > 0.8 * known.optimum
    assert search(name, 192, known, 1, screen=4)[0] == screened


def test_names_are_checked():
    with pytest.raises(ZooError, match=r"Unknown agent 'cmaes'. Did you mean 'cma-es'\?"):
        agent("cmaes")


def test_the_graph_carries_the_present_cost_of_every_operation():
    groups, model = problem().groups, cost_model(problem().groups)
    make = Architecture(groups)
    ratios = np.random.default_rng(0).integers(1, 17, (3, 13)) / 16
    graphs = make(ratios, np.zeros(3))
    layers = set(groups.positions)
    for row, operations in zip(ratios, graphs.operations, strict=True):
        cost = model(round_widths(groups.sizes, row))
        assert float(operations[:, 3].sum()) == pytest.approx(cost.macs / model.dense.macs)
        norms = cost.params / model.dense.params - float(operations[:, 2].sum())
        assert 0 < norms < 0.01
    assert graphs.operations.shape[1] == len(layers) == 23
    assert graphs.nodes.shape[:2] == (3, 13 + 2)
    assert graphs.stage.unique().numel() == 5  # the image, three resolutions, the classes
    before, after = Actor(13)(make(np.ones((1, 13)), np.zeros(1))), Actor(13)(graphs)
    assert before.shape == (1, 13)
    assert not torch.equal(after[0], after[1])


@pytest.mark.parametrize("arch", ["resnet20", "cnet", "torchvision:densenet121"])
def test_a_layer_between_several_maps_is_shared_out_among_its_operations(arch):
    groups = reference_groups(arch)
    [operations] = Architecture(groups)(np.ones((1, len(groups.sizes))), np.zeros(1)).operations
    assert float(operations[:, 3].sum()) == pytest.approx(1, abs=1e-4)
    assert 0.95 < float(operations[:, 2].sum()) <= 1


def test_gnn_ends_an_episode_at_the_constraint():
    known = problem()
    played, _ = search("gnn", 32, known)
    model = cost_model(known.groups)
    for episode in played:
        reached = model.factor(round_widths(known.groups.sizes, episode["actions"]), "params")
        assert reached >= known.cf
        before = [min(1.0, 2 * beta) for beta in episode["actions"]]  # a step halves at most
        assert model.factor(round_widths(known.groups.sizes, before), "params") < known.cf


class FlatActor(torch.nn.Module):
    """Knows nothing but how much compression is still to come."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 13)

    def forward(self, graphs):
        return self.layer(graphs.nodes[:, 0, -1:]).tanh()


def test_gnn_trains_the_actor_and_critic_that_it_is_given():
    torch.manual_seed(0)
    actor, critic = FlatActor(), Critic(embedding=8)
    before = [parameter.clone() for parameter in (*actor.parameters(), *critic.parameters())]
    _, proposed = search("gnn", 64, problem(), actor=actor, critic=critic)
    after = (*actor.parameters(), *critic.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = train_gnn(problem().env(), 0, seed=9, on_episode=print, actor=actor, critic=critic)
    assert again == proposed
