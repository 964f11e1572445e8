"""Examinations: searched profiles beside their rivals, on networks and data that no search saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from zoo.data.datasets import load_data
from zoo.data.images import ImageSet
from zoo.errors import ZooError
from zoo.planning.policies import policy_solution
from zoo.search.agents import SCREENED, STARTING
from zoo.search.campaign import search_profile
from zoo.search.certificate import Certificate, Pair, certify
from zoo.search.env import EnvSettings
from zoo.search.evaluation import Evaluator
from zoo.search.evidence import evidence, examined, policy_widths
from zoo.search.fidelities import FineTuning
from zoo.search.ledger import Ledger
from zoo.search.settings import SearchConfig, cost_of, pool_for
from zoo.search.tasks import Candidate, Task, load_tasks, say, task_data
from zoo.spec.cost import CostModel
from zoo.spec.profile import Evidence, Profile
from zoo.tracing.known_groups import reference_groups

__all__ = ["Examination", "Examined", "examine"]

Widths = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What is searched, and what the profiles are compared with."""

    search: SearchConfig
    """the search"""
    exams: tuple[str, ...]
    """CHECKPOINT@DATA of base networks that no search saw; the ranking is on the first"""
    rivals: tuple[str, ...] = ("equal", "increasing", "decreasing", "greedy")
    """policies that the searched profile is compared with, if they reach its factor"""
    rival_agents: tuple[str, ...] = ("cma-es",)
    """agents that search for more rivals on the same terms"""
    random: int = 200
    """random profiles in the ranking of the searched one; the best of them is a rival too"""
    images: int = 10_000
    """training images of every fine-tune"""
    short_epochs: int = 1
    """of the fine-tune for the ranking"""
    epochs: int = 20
    """of the fine-tune for the comparison"""
    lr: float = 0.05
    """their peak learning rate"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of the channels kept and of the training"""


@dataclass(frozen=True)
class Examined:
    """One searched profile, with its evidence.

    Attributes:
        profile: the profile, its `evidence` included.
        certificate: its rank among random profiles, and the tests against every rival.
    """

    profile: Profile
    certificate: Certificate


def examine(options: Examination) -> Iterator[Examined]:
    """Search, let other agents search on the same terms, examine the profile of every factor.

    Started again, it continues: what the ledgers in the search's folder hold is not measured again.

    Raises:
        ZooError: as `zoo.search_profile`, and for an exam whose base network the search sees.
    """
    config = dataclasses.replace(options.search, resume=True)
    exams, cost = _load_exams(options), cost_of(config, reference_groups(config.arch))
    searched = search_profile(config)
    rivals = [_search_rivals(options, profile) for profile in searched]
    pool = pool_for(config)
    try:
        with Ledger(config.out / "evidence.jsonl") as ledger:
            evaluator = Evaluator(ledger, pool)
            for profile, others in zip(searched, rivals, strict=True):
                yield _examine(options, profile, others, exams, cost, evaluator)
    finally:
        pool.close()


def _examine(
    options: Examination,
    profile: Profile,
    rivals: dict[str, Widths],
    exams: list[Task],
    cost: CostModel,
    evaluator: Evaluator,
) -> Examined:
    """Rank one profile among random ones, and compare it with its rivals."""
    own, random = _ranked(options, profile, exams[0], cost, evaluator)
    best = max(random, key=lambda item: random[item])
    policies = {"searched": _widths(profile), "random, best": best, **rivals}
    policies |= policy_widths(options.rivals, exams[0], cost, profile.cf, profile.metric)
    fidelity = FineTuning.of(options.epochs, options.images, options.lr)
    rows: list[Evidence] = []
    pairs: dict[str, dict[Pair, float]] = {name: {} for name in policies}
    for exam in exams:
        found = evidence(policies, exam, evaluator, fidelity, options.seeds, cost)
        rows += found
        for row in found[1:]:
            measured = zip(row.seeds, row.accuracies, strict=True)
            pairs[row.policy] |= {(exam.network, seed): value for seed, value in measured}
    candidate = pairs.pop("searched")
    certificate = certify(candidate, pairs, own, list(random.values()))
    return Examined(dataclasses.replace(profile, evidence=tuple(rows)), certificate)


def _load_exams(options: Examination) -> list[Task]:
    """The exams, each measured on the test split of its data."""
    config, exams = options.search, []
    load = partial(
        load_tasks, config.arch, data=config.data, data_dir=config.data_dir, size=config.size
    )
    seen = {task.network for task in load((*config.tasks, *config.held_back))}
    for reference in options.exams:
        (task,) = load([reference])
        if task.network in seen:
            raise ZooError(f"The search sees {reference}: an exam needs another base network.")
        name = task_data(reference, config.data)[1]
        test = load_data(name, config.data_dir, size=config.size).test
        if not isinstance(test, ImageSet):
            raise ZooError(f"The test split of {name} does not fit into memory.")
        exams.append(examined(task, test))
    return exams


def _search_rivals(options: Examination, profile: Profile) -> dict[str, Widths]:
    """The widths that other agents find at the profile's factor, in as many episodes."""
    config, made = options.search, profile.provenance
    assert made is not None
    found = {}
    for name in options.rival_agents:
        own = dataclasses.replace(
            config, agent=name, cf=(profile.cf,), episodes=made.episodes, budget=None,
            conditioned=False, out=config.out / name / profile.name, resume=True,
            known=(*config.known, config.out), std=SearchConfig.std,
            start=config.start if name in STARTING else None,
            screen=config.screen if name in SCREENED else 1,
            env=dataclasses.replace(
                config.env, features=EnvSettings.features, observation=EnvSettings.observation
            ),
        )  # fmt: skip
        (rival,) = search_profile(own)
        found[name] = _widths(rival)
    return found


def _ranked(
    options: Examination, profile: Profile, exam: Task, cost: CostModel, evaluator: Evaluator
) -> tuple[float, dict[Widths, float]]:
    """Accuracies after the short fine-tune: of the profile, and of random ones at its factor."""
    drawn = [
        policy_solution("random", cost, profile.cf, profile.metric, seed).widths
        for seed in range(options.random)
    ]
    every = [_widths(profile), *drawn]
    say(f"{len(drawn)} random profiles of {profile.name}, {options.short_epochs} epoch each")
    candidates = [Candidate(exam, kept, options.seeds[0]) for kept in every]
    sources = ["searched"] + ["random"] * len(drawn)
    short = FineTuning.of(options.short_epochs, options.images, options.lr)
    own, *random = evaluator(candidates, short, sources)
    return own, dict(zip(drawn, random, strict=True))


def _widths(profile: Profile) -> Widths:
    return tuple(profile.kept[group] for group in reference_groups(profile.architecture).names)
