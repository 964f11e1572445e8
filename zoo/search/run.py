"""A search from its configuration to profiles with provenance."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest

from zoo.common.documents import read_json, write_json
from zoo.errors import FactorError, ZooError
from zoo.planning.policies import POLICIES, policy_solution
from zoo.planning.solver import scale_curve, solve
from zoo.search.agents import Episode
from zoo.search.env import PruningEnv
from zoo.search.evaluation import Evaluator
from zoo.search.fidelities import Distilled, Fidelity, FineTuning, Recalibration, live_features
from zoo.search.gate import RANKED
from zoo.search.ledger import FILE, Ledger, read
from zoo.search.provenance import Found, as_first_found, profile_of
from zoo.search.settings import SearchConfig, cost_of, parse_budget, pool_for, trainer_of
from zoo.search.starts import Start, check_start, start_at
from zoo.search.tasks import SEARCH_SEEDS, Candidate, Task, load_tasks, say
from zoo.search.vector_env import PruningVectorEnv
from zoo.spec.cost import CostModel
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import Profile
from zoo.tracing.known_groups import reference_groups

__all__ = ["SearchConfig", "SearchInterrupted", "search_profile"]

Widths = tuple[int, ...]

TOGETHER = 8
"""Episodes that are played in lockstep and evaluated together."""


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a search; `profiles` were chosen from the episodes that were played."""

    def __init__(self, profiles: tuple[Profile, ...]) -> None:
        super().__init__("the search was interrupted")
        self.profiles = profiles


def search_profile(config: SearchConfig) -> tuple[Profile, ...]:
    """Search for profiles of an architecture with an agent, one per factor, and write them.

    Episodes are measured after a recalibration, or after one epoch of `episode_images`. The best
    distinct profiles of every task, those that the trained agent proposes, and the one that the
    search started from, are measured again with channel seeds that no episode used; with
    `distill_steps`, the better half of them once more after a distillation. The best few of these
    get a longer fine-tune on the held-back base networks, again with fresh seeds. The best mean
    wins.

    `config.out` holds `ledger.jsonl`, written as the search goes; each profile as
    `<metric>-cf<cf>.json`, as soon as it is chosen; and a report. The same configuration with
    `resume` replays the ledger and continues. Progress goes to standard error. A first Ctrl-C ends
    the episodes: a profile is chosen from those played, and later factors are left out. A second
    one ends the choice.

    With several `workers`, a script that calls this needs `if __name__ == "__main__":`, because
    each process imports the script.

    Returns:
        The profiles, in the order of the factors.

    Raises:
        SearchInterrupted: after Ctrl-C, when everything is written, with the profiles chosen.
        FactorError: for a factor out of reach, naming the reachable range.
        ZooError: for tasks that do not fit, a base network near chance, an unknown agent or an
            option that it does not have, a profile that cannot be started from, a missing extra, or
            an `out` that holds a run (without `resume`) or another search, or that another process
            is writing.
    """
    from zoo.search.report import write_report

    path = config.out / FILE
    if not config.resume and path.exists() and path.stat().st_size:
        raise ZooError(f"{config.out} holds a run already: add --resume, or name another --out.")
    with Ledger(path, known=read(config.known)) as ledger:
        search = _Search.prepared(config, ledger)
        profiles = []
        try:
            for found in search.run():
                profile = profile_of(config, search.groups, found)
                own = config.out / f"{profile.name}.json"
                profiles.append(as_first_found(profile, own))
                profiles[-1].write(own)
        finally:
            search.evaluator.pool.close()
        bases = {task.network: task.base_accuracy for task in (*search.tasks, *search.judges)}
        write_report(config.out, profiles, search.episodes, ledger, search.cost, bases)
    if search.interrupted:
        raise SearchInterrupted(tuple(profiles))
    return tuple(profiles)


@dataclass
class _Search:
    """The parts of a running search, and the episodes that it has played."""

    config: SearchConfig
    groups: ChannelGroups
    cost: CostModel
    tasks: tuple[Task, ...]
    judges: tuple[Task, ...]
    evaluator: Evaluator
    start: dict[float, Start] | None = None
    episodes: list[Episode] = field(default_factory=list)
    interrupted: bool = False

    @classmethod
    def prepared(cls, config: SearchConfig, ledger: Ledger) -> _Search:
        """A search whose tasks are loaded and whose factors are checked to be reachable."""
        groups = reference_groups(config.arch)
        cost = cost_of(config, groups)
        for cf in config.cf:
            solve(cost, scale_curve([1.0] * len(groups.sizes)), cf, config.env.metric)
            if config.start is not None:
                check_start(config.start, config.arch, groups, cf, config.env.metric)
        trainer_of(config)
        load = partial(
            load_tasks, config.arch, data=config.data, data_dir=config.data_dir, size=config.size
        )
        judges = load(config.held_back) if config.held_back else ()
        tasks = load(config.tasks)
        for task in tasks:
            say(f"task {task.name}: base {task.base_accuracy:.2%} on the validation split")
        if {task.network for task in tasks} & {judge.network for judge in judges}:
            raise ZooError("A held-back base network is a task of the search too: name another.")
        start = _start(config, tasks, cost)
        _check_run(config, tasks, judges)
        if config.env.metric not in RANKED and config.episode_images is None:
            say(
                f"Recalibration is not known to rank the best profiles by {config.env.metric} as a "
                f"long fine-tune does; scripts/evidence/gate.py measures it."
            )
        if not judges:
            say("No base network is held back: finalists are compared on the tasks themselves.")
        evaluator = Evaluator(ledger, pool_for(config))
        return cls(config, groups, cost, tasks, judges or tasks, evaluator, start)

    def run(self) -> Iterator[Found]:
        """Play the episodes of every factor and choose the profile of each."""
        config = self.config
        runs = [config.cf] if config.conditioned else [(cf,) for cf in config.cf]
        budget = None if config.budget is None else parse_budget(config.budget) / len(runs)
        for factors in runs:
            run = _AgentRun(self, factors, budget)
            proposals = run.play()
            for cf in factors:
                candidates = self._candidates(cf, [e for e in proposals if e["cf"] == cf])
                if not candidates:
                    say(f"{cf:g}x: no episode was finished, there is nothing to choose from")
                    continue
                self._measure_policies(cf)
                yield run.found(cf, *self._choose(candidates))
            self.interrupted = run.interrupted
            if self.interrupted:
                return

    def measure(self, candidates: Sequence[Candidate]) -> list[float]:
        """The accuracies of finished episodes."""
        return self.evaluator(candidates, self.fidelity, self.config.agent)

    @property
    def fidelity(self) -> Fidelity:
        """The fidelity that episodes are measured at."""
        return self._cheap(self.config.val_images)

    def _cheap(self, val_images: int | None) -> Fidelity:
        config = self.config
        if config.episode_images is not None:
            return FineTuning.of(1, config.episode_images, config.finetune_lr)
        return Recalibration(config.calibration_images, val_images)

    def _candidates(self, cf: float, proposals: Sequence[Episode]) -> list[Widths]:
        """Distinct widths: of the best episodes at `cf`, those that the agent proposes, the start.

        The tasks take turns, because rewards on different tasks cannot be compared: on some, every
        profile keeps less accuracy.
        """
        ranked = []
        for task in self.tasks:
            rewards: dict[Widths, float] = {}
            for episode in self.episodes:
                if (episode["cf"], episode["task"]) == (cf, task.name):
                    rewards[self._at_factor(episode)] = episode["reward"]
            ranked.append(sorted(rewards, key=lambda widths: -rewards[widths]))
        turns = [widths for turn in zip_longest(*ranked) for widths in turn if widths]
        best = list(dict.fromkeys(turns))[: self.config.candidates]
        started = [] if self.start is None else [self._started(cf)]
        return list(dict.fromkeys([*best, *map(self._at_factor, proposals), *started]))

    def _started(self, cf: float) -> Widths:
        """The widths of the profile that the search at `cf` started from."""
        assert self.start is not None
        curve = scale_curve(self.start[cf].ratios)
        return solve(self.cost, curve, cf, self.config.env.metric).widths

    def _at_factor(self, episode: Episode) -> Widths:
        """The episode's widths, scaled to its factor unless the projection did so."""
        if self.config.env.projection == "scale":
            return episode["widths"]
        curve = scale_curve(episode["keep_ratios"])
        return solve(self.cost, curve, episode["cf"], self.config.env.metric).widths

    def _measure_policies(self, cf: float) -> None:
        """Measure the profiles of all policies as candidates are, for the report."""
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
        return seeds, self._cheap(None)

    def _choose(self, candidates: Sequence[Widths]) -> tuple[Widths, Fidelity]:
        """The candidate with the best mean over base networks and fresh seeds, and its fidelity."""
        config, (seeds, fidelity) = self.config, self._fresh
        ranked = self._rank(candidates, self.tasks, seeds, fidelity)
        tuned = FineTuning.of(config.finetune_epochs, config.finetune_images, config.finetune_lr)
        seeds = range(seeds.stop, seeds.stop + config.final_seeds)
        if config.distill_steps is not None:
            better = ranked[: max(config.finalists, (len(ranked) + 1) // 2)]
            unseen = range(seeds.stop, seeds.stop + config.final_seeds)
            ranked = self._rank(better, self.tasks, unseen, Distilled(config.distill_steps))
        finalists = ranked[: config.finalists]
        return self._rank(finalists, self.judges, seeds, tuned)[0], tuned

    def _rank(
        self,
        profiles: Sequence[Widths],
        tasks: Sequence[Task],
        seeds: Sequence[int],
        fidelity: Fidelity,
        source: str = "choice",
    ) -> list[Widths]:
        """The profiles, ranked by their mean share of the base accuracy over tasks and seeds."""
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


class _AgentRun:
    """The agent's episodes at one or several factors, their progress lines and their budget."""

    def __init__(self, search: _Search, factors: tuple[float, ...], budget: float | None) -> None:
        self.search, self.factors, self.budget = search, factors, budget
        self.total = search.config.most_episodes * len(factors)
        self.played: list[Episode] = []
        self.interrupted = self._late = False
        self._started, self._before = time.perf_counter(), search.evaluator.spent

    def play(self) -> list[Episode]:
        """Train the agent, and return the episodes that it proposes in the end."""
        search, config = self.search, self.search.config
        start = {cf: own.ratios for cf, own in search.start.items()} if search.start else None
        make_env = partial(
            PruningEnv, search.tasks, search.groups, self.factors, search.measure, config.env,
            cost=search.cost, live_features=live_features, start=start,
        )  # fmt: skip
        env = PruningVectorEnv(make_env, TOGETHER)
        proposals = trainer_of(config)(
            env, self.total, seed=config.seed, on_episode=self._add, stop=self._out_of_time
        )
        missing = self.total - len(self.played)
        self.interrupted = not self._late and missing >= len(env.queue)
        return proposals

    def found(self, cf: float, widths: Widths, choice: Fidelity) -> Found:
        """The winner at `cf`, with the cost of these episodes and of the choice."""
        search = self.search
        evaluations, _ = search.evaluator.spent
        return Found(
            cf=cf,
            got=search.cost.factor(widths, search.config.env.metric),
            widths=widths,
            episodes=sum(episode["cf"] == cf for episode in self.played),
            evaluations=evaluations - self._before[0],
            seconds=self._seconds,
            tasks=search.tasks,
            judges=search.judges,
            start=search.start[cf].name if search.start else None,
            fidelity=f"search: {search.fidelity.name}; choice: {choice.name}",
        )

    @property
    def _seconds(self) -> float:
        """Wall time in seconds, plus the original time of replayed evaluations."""
        replayed = self.search.evaluator.spent[1] - self._before[1]
        return time.perf_counter() - self._started + replayed / self.search.evaluator.pool.size

    def _out_of_time(self) -> bool:
        self._late = self.budget is not None and self._seconds >= self.budget
        return self._late

    def _add(self, episode: Episode) -> None:
        """Remember an episode; print a line of progress after every round."""
        self.played.append(episode)
        self.search.episodes.append(episode)
        if len(self.played) % TOGETHER == 0:
            say(self._line())

    def _line(self) -> str:
        recent = statistics.mean(episode["reward"] for episode in self.played[-TOGETHER:])
        best = max(self.played, key=lambda episode: episode["reward"])
        rate = len(self.played) / self._seconds
        left = max(0, self.total - len(self.played)) / rate
        if self.budget is not None:
            left = min(left, max(0.0, self.budget - self._seconds))
        return (
            f"episode {len(self.played)}/{self.total}  reward {recent:.3f} (mean of {TOGETHER})  "
            f"best {best['reward']:.3f} at {best['factor']:.2f}x {list(best['widths'])}  "
            f"{60 * rate:.0f} evaluations/min  {math.ceil(left / 60)} min left"
        )


def _start(
    config: SearchConfig, tasks: Sequence[Task], cost: CostModel
) -> dict[float, Start] | None:
    """Factor -> what its search starts from; None for a search without a start."""
    if config.start is None:
        return None
    found, metric = {}, config.env.metric
    for cf in config.cf:
        name, ratios = found[cf] = start_at(config.start, config.arch, tasks, cost, cf, metric)
        told = " ".join(f"{ratio:.2f}" for ratio in ratios)
        say(f"{cf:g}x starts from {name}: keep ratios {told}")
    return found


def _check_run(config: SearchConfig, tasks: Sequence[Task], judges: Sequence[Task]) -> None:
    """Write down what the folder's search is of; refuse the folder of another search."""
    own = {
        "arch": config.arch,
        "tasks": [task.network for task in tasks],
        "held_back": [judge.network for judge in judges],
        **({} if config.start is None else {"from": config.start}),
    }
    path = config.out / "search.json"
    known = read_json(path) if path.exists() else own
    if {**known, "from": None} != {**own, "from": None}:
        raise ZooError(
            f"{config.out} holds a search of another architecture or of other base networks: name "
            f"another --out."
        )
    if known != own:
        raise ZooError(
            f"{config.out} holds a search that started from {known.get('from', 'no profile')}, not "
            f"from {config.start or 'none'}: give the same --from, or name another --out."
        )
    write_json(path, own)
