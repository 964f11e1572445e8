"""Search profiles, compare each with rivals on networks and data that no search saw; bundle them.

    python scripts/evidence/examine.py --search.arch resnet20-16 --search.cf 4 --search.size 16 \
        --search.tasks s0.safetensors@cifar10 --search.data-dir DIR --search.out runs/params \
        --exams s2.safetensors@cifar10 "b.safetensors@imagefolder:DIR[50:]" --bundle

Started again, it continues: what its ledgers hold is not measured again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from zoo.data.datasets import load_data
from zoo.errors import FactorError, ZooError
from zoo.planning.policies import policy_solution
from zoo.registry.store import folder_name, write_index
from zoo.search.campaign import search_profile
from zoo.search.certificate import Certificate, Pair, certify
from zoo.search.env import EnvSettings
from zoo.search.evaluation import Evaluator
from zoo.search.evidence import evidence, examined
from zoo.search.fidelities import FineTuning
from zoo.search.ledger import Ledger
from zoo.search.settings import SearchConfig, cost_of, pool_for
from zoo.search.tasks import Candidate, Task, load_tasks, say, task_data
from zoo.spec.cost import CostModel
from zoo.spec.profile import Evidence, Profile
from zoo.tracing.known_groups import reference_groups

REGISTRY = Path(__file__).resolve().parents[2] / "registry"
Widths = tuple[int, ...]


@dataclass(frozen=True)
class Examination:
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
    bundle: bool = False
    """put the profiles into the registry"""


def main(options: Examination) -> None:
    """Search, let other agents search on the same terms, examine the profile of every factor."""
    config = dataclasses.replace(options.search, resume=True)
    exams, cost = load_exams(options), cost_of(config, reference_groups(config.arch))
    searched = search_profile(config)
    rivals = [search_rivals(options, profile) for profile in searched]
    pool = pool_for(config)
    with Ledger(config.out / "evidence.jsonl") as ledger:
        evaluator = Evaluator(ledger, pool)
        for profile, others in zip(searched, rivals, strict=True):
            examine(options, profile, others, exams, cost, evaluator)
    pool.close()


def load_exams(options: Examination) -> list[Task]:
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
        exams.append(examined(task, test))
    return exams


def search_rivals(options: Examination, profile: Profile) -> dict[str, Widths]:
    """The widths that other agents find at the profile's factor, in as many episodes."""
    config, made = options.search, profile.provenance
    assert made is not None
    found = {}
    for name in options.rival_agents:
        own = dataclasses.replace(
            config, agent=name, cf=(profile.cf,), episodes=made.episodes, budget=None,
            conditioned=False, out=config.out / name / profile.name, resume=True,
            known=(*config.known, config.out), std=SearchConfig.std,
            env=dataclasses.replace(
                config.env, features=EnvSettings.features, observation=EnvSettings.observation
            ),
        )  # fmt: skip
        (rival,) = search_profile(own)
        found[name] = widths(rival)
    return found


def examine(
    options: Examination,
    profile: Profile,
    rivals: dict[str, Widths],
    exams: list[Task],
    cost: CostModel,
    evaluator: Evaluator,
) -> None:
    """Rank one profile among random ones, compare it with its rivals, print both and bundle it."""
    own, random = ranked(options, profile, exams[0], cost, evaluator)
    best = max(random, key=lambda item: random[item])
    policies = {"searched": widths(profile), "random, best": best, **rivals}
    policies |= {name: w for name in options.rivals if (w := solved(name, cost, profile))}
    fidelity = FineTuning.of(options.epochs, options.images, options.lr)
    rows: list[Evidence] = []
    pairs: dict[str, dict[Pair, float]] = {name: {} for name in policies}
    for exam in exams:
        found = evidence(policies, exam, evaluator, fidelity, options.seeds, cost)
        rows += found
        for row in found[1:]:
            measured = zip(row.seeds, row.accuracies, strict=True)
            pairs[row.policy] |= {(exam.network, seed): value for seed, value in measured}
    print(f"\n{profile.architecture} {profile.cf:g}x {profile.metric}")
    for row in rows:
        print(
            f"{row.policy:<14}{cost.dense.params / row.params:6.2f}x params "
            f"{cost.dense.macs / row.macs:6.2f}x MACs  {row.mean:.2%} ± {row.sd:.2%}  {row.data}"
        )
    candidate = pairs.pop("searched")
    print_certificate(options, certify(candidate, pairs, own, list(random.values())))
    if options.bundle:
        bundled = dataclasses.replace(profile, evidence=tuple(rows))
        bundled.write(REGISTRY / folder_name(profile.architecture) / f"{profile.name}.json")
        write_index(REGISTRY)


def print_certificate(options: Examination, certificate: Certificate) -> None:
    rank = certificate.rank
    print(
        f"{rank.at_least_as_good} of {rank.profiles} random profiles are as good on the first exam "
        f"after {options.short_epochs} epoch: {rank.probability:.1%} (95 % interval "
        f"{rank.low:.1%} to {rank.high:.1%})"
    )
    for rival in certificate.comparisons:
        print(
            f"against {rival.rival:<14}{rival.difference:+.2%} ± {rival.sd:.2%} over {rival.pairs} "
            f"pairs of {len(options.exams)} base networks, p {rival.p:.2g}, Holm "
            f"{rival.adjusted:.2g}"
        )
    print("passes" if certificate.passes else "does not pass")


def ranked(
    options: Examination, profile: Profile, exam: Task, cost: CostModel, evaluator: Evaluator
) -> tuple[float, dict[Widths, float]]:
    """Accuracies after the short fine-tune: of the profile, and of random ones at its factor."""
    drawn = [
        policy_solution("random", cost, profile.cf, profile.metric, seed).widths
        for seed in range(options.random)
    ]
    every = [widths(profile), *drawn]
    say(f"{len(drawn)} random profiles of {profile.name}, {options.short_epochs} epoch each")
    candidates = [Candidate(exam, kept, options.seeds[0]) for kept in every]
    sources = ["searched"] + ["random"] * len(drawn)
    short = FineTuning.of(options.short_epochs, options.images, options.lr)
    own, *random = evaluator(candidates, short, sources)
    return own, dict(zip(drawn, random, strict=True))


def widths(profile: Profile) -> Widths:
    return tuple(profile.kept[group] for group in reference_groups(profile.architecture).names)


def solved(policy: str, cost: CostModel, profile: Profile) -> Widths | None:
    """The policy's widths at the profile's factor, or None if it cannot reach that."""
    try:
        return policy_solution(policy, cost, profile.cf, profile.metric).widths
    except FactorError as error:
        say(f"{policy}: {error}")
        return None


if __name__ == "__main__":
    main(tyro.cli(Examination, description=__doc__))
