"""A search from its configuration to profiles with provenance."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes

from zoo.cost import CostModel, cost_model
from zoo.errors import FactorError, ZooError
from zoo.groups import ChannelGroups
from zoo.latency import latency_table
from zoo.models import architecture, build_model
from zoo.profile import Profile
from zoo.pruning.known_groups import reference_groups
from zoo.pruning.policies import POLICIES, policy_solution
from zoo.recipes import Recipe
from zoo.search.agents import agent
from zoo.search.env import EnvSettings, PruningEnv
from zoo.search.evaluation import Evaluator, Fidelity, FineTuning, Recalibration, live_features
from zoo.search.ledger import FILE, Ledger
from zoo.search.provenance import Found, profile_of
from zoo.search.tasks import SEARCH_SEEDS, Candidate, Task, device, load_tasks, say
from zoo.search.vector_env import PruningVectorEnv
from zoo.search.workers import pool_of
from zoo.solver import scale_curve, solve

if TYPE_CHECKING:
    from zoo.search.workers import Pool

__all__ = ["SearchConfig", "search_profile"]

Widths = tuple[int, ...]
Episode = dict[str, Any]

TOGETHER = 8
"""Episodes that are played in lockstep and evaluated together."""


@dataclass(frozen=True)
class SearchConfig:
    """One search: everything that its profiles depend on."""

    arch: str
    """architecture to search for"""
    tasks: tuple[str, ...]
    """base networks, none trained on the validation split: CHECKPOINT, or CHECKPOINT@DATA"""
    out: Path
    """folder of the ledger, the profiles and the report"""
    cf: tuple[float, ...] = (4.0,)
    """compression factors, met at the architecture's reference; a profile for each"""
    agent: str = "ppo"
    """ppo, ddpg, gnn, random, cma-es, genetic, swarm or annealing"""
    env: Annotated[EnvSettings, OmitArgPrefixes] = field(default_factory=EnvSettings)
    """what the agent sees, does and is rewarded for"""
    episodes: int = 320
    """episodes per factor, rounded up to whole rounds of eight"""
    budget: str | None = None
    """wall time of all episodes, as 20m or 1h30m; the choice at the end comes on top"""
    resume: bool = False
    """go on with the run in --out"""
    conditioned: bool = False
    """one policy that is told the factor, instead of one per factor"""
    held_back: tuple[str, ...] = ()
    """base networks that no episode plays, on which finalists are compared; else the tasks"""
    data: str = "cifar10"
    """data set of the base networks that name none"""
    data_dir: Path | None = None
    """folder of that data set's files"""
    size: int = 32
    """pixels per side that the images are resized to"""
    seed: int = 0
    """of the agent"""
    std: float = 0.3
    """initial standard deviation of PPO's actions, on [-1, 1]"""
    workers: int | None = None
    """processes that evaluate; one per core by default"""
    cluster: str | None = None
    """evaluate on Ray: the address of a cluster, or local"""
    calibration_images: int = 1024
    """training images for the recalibration of a candidate"""
    val_images: int | None = 2000
    """validation images that episodes are measured on"""
    candidates: int = 12
    """distinct best profiles that are measured again, on all images and fresh channels"""
    finalists: int = 5
    """of these, how many get a short fine-tune"""
    final_seeds: int = 2
    """channel seeds per task for candidates and finalists"""
    finetune_epochs: int = 1
    """epochs of the short fine-tune"""
    finetune_images: int | None = 10_000
    """training images of the short fine-tune"""
    finetune_lr: float = 0.05
    """peak learning rate of the short fine-tune"""


def search_profile(config: SearchConfig) -> tuple[Profile, ...]:
    """Search by an agent for profiles of an architecture, one per factor, choose, and write them.

    Episodes are measured by recalibration alone. The best distinct ones and what the agent itself
    proposes in the end are measured again with channel seeds that no episode used; the best few of
    those get a short fine-tune on the held-back base networks, again on fresh seeds, and the best
    mean wins.

    `config.out` holds `ledger.jsonl`, written as the search goes (running the same configuration
    again with `resume` replays it and goes on), each profile as `<metric>-cf<cf>.json`, and a
    report. Progress goes to standard error. Ctrl-C ends the episodes of a factor and goes on to
    the choice; again, it ends that.

    Raises:
        FactorError: for a factor out of reach, naming the reachable range.
        ZooError: for tasks that do not fit, a base network near chance, an unknown agent, a missing
            extra, a folder that holds a run already, or one that another process is writing.
    """
    from zoo.search.report import write_report

    budget = None if config.budget is None else parse_budget(config.budget)
    path = config.out / FILE
    if path.exists() and not config.resume:
        raise ZooError(f"{config.out} holds a run already: add --resume, or name another --out.")
    with Ledger(path) as ledger:
        search = _Search.prepared(config, ledger)
        try:
            found = search.run(budget)
        finally:
            search.evaluator.pool.close()
        profiles = tuple(profile_of(config, search.groups, one) for one in found)
        for profile in profiles:
            profile.write(config.out / f"{profile.name}.json")
        bases = {task.network: task.base_accuracy for task in (*search.tasks, *search.judges)}
        write_report(config.out, profiles, search.episodes, ledger, search.cost, bases)
    return profiles


def parse_budget(text: str) -> float:
    """Seconds of a wall time such as `20m`, `1h30m` or `90s`.

    Raises:
        ZooError: for anything else, and for no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    seconds = sum(
        int(count or 0) * unit
        for count, unit in zip(match.groups() if match else (), (3600, 60, 1), strict=False)
    )
    if not seconds:
        raise ZooError(f"{text!r} is no budget: write it as 20m, 1h30m or 90s.")
    return seconds


@dataclass
class _Search:
    """The parts of a running search, and the episodes that it has played."""

    config: SearchConfig
    groups: ChannelGroups
    cost: CostModel
    tasks: tuple[Task, ...]
    judges: tuple[Task, ...]
    evaluator: Evaluator
    started: float = field(default_factory=time.perf_counter)
    episodes: list[Episode] = field(default_factory=list)

    @classmethod
    def prepared(cls, config: SearchConfig, ledger: Ledger) -> _Search:
        """A search with its tasks loaded and its factors known to be in reach."""
        groups = reference_groups(config.arch)
        cost = _cost(config, groups)
        for cf in config.cf:
            solve(cost, scale_curve([1.0] * len(groups.sizes)), cf, config.env.metric)
        _trainer(config)
        judges = held_back(config)
        tasks = load_tasks(config.arch, config.tasks, config.data, config.data_dir, config.size)
        for task in tasks:
            say(f"task {task.name}: base {task.base_accuracy:.2%} on the validation split")
        if {task.network for task in tasks} & {judge.network for judge in judges}:
            raise ZooError("A held-back base network is a task of the search too: name another.")
        return cls(config, groups, cost, tasks, judges or tasks, Evaluator(ledger, _pool(config)))

    def run(self, budget: float | None) -> list[Found]:
        """Play the episodes of every factor and choose the profile of each."""
        config, found = self.config, []
        legs = [config.cf] if config.conditioned else [(cf,) for cf in config.cf]
        for number, factors in enumerate(legs, start=1):
            deadline = None if budget is None else budget * number / len(legs)
            proposals = self._learn(factors, deadline)
            for cf in factors:
                own = [proposal for proposal in proposals if proposal["cf"] == cf]
                self._measure_policies(cf)
                widths, fidelity = self._choose(self._candidates(cf, own))
                played = sum(episode["cf"] == cf for episode in self.episodes)
                found.append(self._found(cf, widths, played, fidelity))
        return found

    def _learn(self, factors: tuple[float, ...], deadline: float | None) -> list[Episode]:
        """The agent's episodes at these factors; what it proposes in the end."""
        config, total = self.config, self.config.episodes * len(factors)
        progress = _Progress(self, total, deadline)
        make_env = partial(
            PruningEnv, self.tasks, self.groups, factors, self._measure, config.env,
            cost=self.cost, live_features=live_features,
        )  # fmt: skip
        return _trainer(config)(
            PruningVectorEnv(make_env, TOGETHER),
            total,
            seed=config.seed,
            on_episode=progress.add,
            stop=progress.out_of_time,
        )

    def _measure(self, candidates: Sequence[Candidate]) -> list[float]:
        fidelity = Recalibration(self.config.calibration_images, self.config.val_images)
        return self.evaluator(candidates, fidelity, self.config.agent)

    def _candidates(self, cf: float, proposals: Sequence[Episode]) -> list[Widths]:
        """Distinct widths: the best episodes at `cf`, then what the agent proposes.

        The same profile played on several tasks counts with its mean reward.
        """
        rewards: dict[Widths, list[float]] = {}
        for episode in self.episodes:
            if episode["cf"] == cf:
                rewards.setdefault(self._at_factor(episode), []).append(episode["reward"])
        ranked = sorted(rewards, key=lambda widths: -statistics.mean(rewards[widths]))
        best = ranked[: self.config.candidates]
        return list(dict.fromkeys([*best, *map(self._at_factor, proposals)]))

    def _at_factor(self, episode: Episode) -> Widths:
        """The episode's widths; without exact projection, scaled to its factor."""
        if self.config.env.projection == "scale":
            return episode["widths"]
        curve = scale_curve(episode["keep_ratios"])
        return solve(self.cost, curve, episode["cf"], self.config.env.metric).widths

    def _measure_policies(self, cf: float) -> None:
        """What profiles without a search keep, measured as candidates are, for the report."""
        for policy in POLICIES:
            try:
                found = policy_solution(policy, self.cost, cf, self.config.env.metric)
            except FactorError as error:
                say(f"{policy}: {error}")
                continue
            say(f"{policy} at {found.got:.2f}x:")
            self._rank([found.widths], self.tasks, *self._fresh, policy)

    @property
    def _fresh(self) -> tuple[range, Fidelity]:
        """Channel seeds that no episode used, and the fidelity that candidates are measured at."""
        first = SEARCH_SEEDS[1]
        seeds = range(first, first + self.config.final_seeds)
        return seeds, Recalibration(self.config.calibration_images)

    def _choose(self, candidates: Sequence[Widths]) -> tuple[Widths, Fidelity]:
        """The candidate of best mean over base networks and fresh seeds, and what measured it."""
        config, (seeds, fidelity) = self.config, self._fresh
        finalists = self._rank(candidates, self.tasks, seeds, fidelity)[: config.finalists]
        recipe = Recipe(epochs=config.finetune_epochs, lr=config.finetune_lr, precision="fp32")
        tuned = FineTuning(recipe, config.finetune_images)
        seeds = range(seeds.stop, seeds.stop + config.final_seeds)
        return self._rank(finalists, self.judges, seeds, tuned)[0], tuned

    def _rank(
        self,
        profiles: Sequence[Widths],
        tasks: Sequence[Task],
        seeds: Sequence[int],
        fidelity: Fidelity,
        source: str = "choice",
    ) -> list[Widths]:
        """The profiles, best mean share of the base accuracy over tasks and seeds first."""
        candidates = [Candidate(t, w, s) for w in profiles for t in tasks for s in seeds]
        accuracies = self.evaluator(candidates, fidelity, source)
        shares: dict[Widths, list[float]] = {}
        for candidate, accuracy in zip(candidates, accuracies, strict=True):
            share = accuracy / candidate.task.base_accuracy
            shares.setdefault(candidate.widths, []).append(share)
        means = {widths: statistics.mean(values) for widths, values in shares.items()}
        ranked = sorted(means, key=lambda widths: -means[widths])
        for widths in ranked:
            say(f"{fidelity.name}: {means[widths]:.3f} of base  {list(widths)}")
        return ranked

    def _found(self, cf: float, widths: Widths, played: int, fidelity: Fidelity) -> Found:
        evaluator, config = self.evaluator, self.config
        search = Recalibration(config.calibration_images, config.val_images)
        return Found(
            cf=cf,
            got=self.cost.factor(widths, config.env.metric),
            widths=widths,
            episodes=played,
            evaluations=evaluator.measured + evaluator.replayed,
            seconds=time.perf_counter() - self.started + evaluator.replayed_seconds,
            tasks=self.tasks,
            judges=self.judges,
            fidelity=f"search: {search.name}; choice: {fidelity.name}",
        )


@dataclass
class _Progress:
    """The lines that say how one agent's episodes go, and when their time is over."""

    search: _Search
    total: int
    deadline: float | None
    started: float = field(default_factory=time.perf_counter)
    played: list[Episode] = field(default_factory=list)

    def out_of_time(self) -> bool:
        """Whether the search has run for as long as the budget gives these episodes."""
        if self.deadline is None:
            return False
        return time.perf_counter() - self.search.started >= self.deadline

    def add(self, episode: Episode) -> None:
        """Remember an episode; say what there is to say after every round."""
        self.played.append(episode)
        self.search.episodes.append(episode)
        if len(self.played) % TOGETHER == 0:
            say(self._line())

    def _line(self) -> str:
        recent = statistics.mean(episode["reward"] for episode in self.played[-TOGETHER:])
        best = max(self.played, key=lambda episode: episode["reward"])
        now = time.perf_counter()
        rate = len(self.played) / (now - self.started)
        left = max(0, self.total - len(self.played)) / rate
        if self.deadline is not None:
            left = min(left, max(0.0, self.deadline - (now - self.search.started)))
        return (
            f"episode {len(self.played)}/{self.total}  reward {recent:.3f} (mean of {TOGETHER})  "
            f"best {best['reward']:.3f} at {best['factor']:.2f}x {list(best['widths'])}  "
            f"{60 * rate:.0f} evaluations/min  {math.ceil(left / 60)} min left"
        )


def held_back(config: SearchConfig) -> tuple[Task, ...]:
    """The base networks that finalists are compared on, where the configuration names some."""
    if not config.held_back:
        return ()
    return load_tasks(config.arch, config.held_back, config.data, config.data_dir, config.size)


def _trainer(config: SearchConfig) -> Callable[..., list[Episode]]:
    """The agent's learning loop, with what the configuration says of it."""
    train = agent(config.agent)
    if config.agent != "ppo":
        return train
    from zoo.search.agents.ppo import PPOSettings

    return partial(train, settings=PPOSettings(std=config.std))


def _cost(config: SearchConfig, groups: ChannelGroups) -> CostModel:
    """Costs of the reference; for latency its layers are timed here, or remembered."""
    if config.env.metric != "latency":
        return cost_model(groups)
    dense = build_model(config.arch, architecture(config.arch).num_classes).to(device()).eval()
    return cost_model(groups, latency_table(dense, groups))


def _pool(config: SearchConfig) -> Pool:
    if config.cluster is None:
        return pool_of(config.workers)
    from zoo.search.cluster import RayPool

    return RayPool(config.cluster, config.workers)
