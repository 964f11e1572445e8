"""A search from its configuration to a profile with provenance, and the evidence for profiles."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from zoo.checkpoints import load_dense
from zoo.cost import cost_model
from zoo.data import Splits, load_data
from zoo.errors import ZooError
from zoo.groups import ChannelGroups
from zoo.models import architecture
from zoo.profile import Profile, Provenance, Reference
from zoo.pruning.known_groups import reference_groups
from zoo.pruning.surgery import named_tensors
from zoo.search.evaluation import (
    SEARCH_SEEDS,
    Evaluator,
    Fidelity,
    Task,
    make_task,
    recalibration,
    say,
    short_finetune,
)
from zoo.search.ledger import Ledger
from zoo.solver import scale_curve, solve
from zoo.training import Recipe

__all__ = ["SearchConfig", "load_tasks", "search_profile"]

Widths = tuple[int, ...]


@dataclass(frozen=True)
class SearchConfig:
    """One search: everything that its profile depends on."""

    arch: str
    """architecture to search for"""
    tasks: tuple[str, ...]
    """checkpoints of base networks, none trained on the validation split"""
    out: Path
    """folder of ledger.jsonl and the profile"""
    cf: float = 4.0
    """compression factor, met at the architecture's reference"""
    metric: Literal["params", "macs"] = "params"
    """what is compressed"""
    data: str = "cifar10"
    """name of the data set of every task"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: int = 32
    """pixels per side that the images are resized to"""
    episodes: int = 320
    """episodes that PPO plays, rounded up to whole updates"""
    seed: int = 0
    """of the policy, the environment and the channels"""
    projection: Literal["scale", "none"] = "scale"
    """scale: every profile meets the factor; none: the reward alone asks for it"""
    std: float = 0.3
    """initial standard deviation of PPO's actions, on [-1, 1]"""
    calibration_images: int = 2048
    """training images for the recalibration of a candidate"""
    val_images: int | None = None
    """validation images that candidates are measured on; all by default"""
    candidates: int = 12
    """distinct best profiles of the search that are measured again on fresh channels"""
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


@dataclass
class _Progress:
    """What the episodes have found so far, and the lines that say so."""

    evaluator: Evaluator
    total: int
    started: float = field(default_factory=time.perf_counter)
    episodes: list[dict[str, Any]] = field(default_factory=list)

    def add(self, info: dict[str, Any]) -> None:
        self.episodes.append(info)
        if len(self.episodes) % 8 == 0:
            recent = statistics.mean(episode["reward"] for episode in self.episodes[-8:])
            best = max(self.episodes, key=lambda episode: episode["reward"])
            rate = self.evaluator.measured / (time.perf_counter() - self.started) * 60
            say(
                f"episode {len(self.episodes)}/{self.total}  reward {recent:.3f} (mean of 8)  "
                f"best {best['reward']:.3f} at {best['factor']:.2f}x {list(best['widths'])}  "
                f"{rate:.0f} evaluations/min"
            )

    def best(self, count: int) -> list[dict[str, Any]]:
        """The `count` episodes of highest reward with distinct widths."""
        distinct: dict[Widths, dict[str, Any]] = {}
        for episode in sorted(self.episodes, key=lambda episode: -episode["reward"]):
            distinct.setdefault(episode["widths"], episode)
        return list(distinct.values())[:count]


def load_tasks(config: SearchConfig) -> tuple[Task, ...]:
    """The tasks of a search: its base networks, each with the data's training and validation split.

    Raises:
        CheckpointError, DataError: when a checkpoint or the data cannot be read.
        ZooError: for no tasks, a base network near chance or kept from another validation split.
    """
    if not config.tasks:
        raise ZooError("A search needs at least one task: name base checkpoints in tasks.")
    splits = load_data(config.data, config.data_dir, size=config.size)
    groups = reference_groups(config.arch)
    return tuple(_load_task(config.arch, groups, path, splits) for path in config.tasks)


def _load_task(arch: str, groups: ChannelGroups, path: str, splits: Splits) -> Task:
    size = splits.val.image_size
    module, checkpoint, classes, _ = load_dense(arch, path, image_size=size)
    if classes != splits.num_classes:
        raise ZooError(
            f"{path} has {classes} classes, the data set {splits.val.name} {splits.num_classes}."
        )
    trained_beside = checkpoint.metadata.get("split_digest")
    if trained_beside is None:
        say(f"{path} does not say which validation split it was kept from; it is taken on trust.")
    elif trained_beside != splits.digest:
        raise ZooError(
            f"{path} was trained beside another validation split ({trained_beside[:12]}) than that "
            f"of {splits.val.name} ({splits.digest[:12]}): it may have seen the images that score "
            f"the search. Train a base network on this data."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}
    digest, own = checkpoint.source.sha256, groups.adapted(shapes, size)
    return make_task(Path(path).name, module, own, splits.train, splits.val, network=digest)


def search_profile(config: SearchConfig) -> Profile:
    """Search by PPO for the profile of an architecture, choose among its best, and write it.

    Candidates are measured by recalibration alone. The best distinct ones and the final policy's
    own profile for each task are measured again with channel seeds that no episode used; the best
    few of those get a short fine-tune, again on fresh seeds, and the best mean over all tasks wins.

    `config.out` holds `ledger.jsonl`, written as the search goes (running the same configuration
    again replays it and goes on), and at the end the profile as `<metric>-cf<cf>.json`. Progress
    goes to standard error. Ctrl-C ends the search and goes on to the choice; again, it ends that.

    Raises:
        FactorError: for a factor out of reach, naming the reachable range.
        ZooError: for tasks that do not fit, a base network near chance, or a missing extra.
    """
    import zoo.search.env as environment
    from zoo.search.agents.ppo import PPOSettings, train_ppo

    started = time.perf_counter()
    groups = reference_groups(config.arch)
    tasks = load_tasks(config)
    for task in tasks:
        say(f"task {task.name}: base {task.base_accuracy:.2%} on the validation split")
    evaluator = Evaluator(Ledger(config.out / "ledger.jsonl"))
    measure = partial(
        evaluator, fidelity=recalibration(config.calibration_images, config.val_images)
    )

    def make_env() -> environment.PruningEnv:
        return environment.PruningEnv(
            tasks, groups, config.cf, measure, config.metric, config.projection
        )

    progress = _Progress(evaluator, config.episodes)
    settings = PPOSettings(std=config.std)
    policy = train_ppo(
        make_env, config.episodes, seed=config.seed, on_episode=progress.add, settings=settings
    )
    played = len(progress.episodes)
    found = progress.best(config.candidates)
    found += [_play(make_env(), policy, position) for position in range(len(tasks))]
    candidates = list(
        dict.fromkeys(_meeting_the_factor(config, groups, episode) for episode in found)
    )
    winner, fidelity = _choose(config, tasks, candidates, evaluator)
    profile = _profile(config, groups, winner, tasks, fidelity, evaluator, played, started)
    profile.write(config.out / f"{profile.name}.json")
    return profile


def _play(env: Any, policy: Callable, position: int) -> dict[str, Any]:
    """The last info of one episode that the policy plays on the task at `position`."""
    observation, _ = env.reset(seed=position)
    done = False
    while not done:
        observation, _, done, _, info = env.step(policy(observation))
    return info


def _meeting_the_factor(
    config: SearchConfig, groups: ChannelGroups, episode: dict[str, Any]
) -> Widths:
    if config.projection == "scale":
        return episode["widths"]
    model = cost_model(groups)
    return solve(model, scale_curve(episode["keep_ratios"]), config.cf, config.metric).widths


def _choose(
    config: SearchConfig, tasks: Sequence[Task], candidates: Sequence[Widths], evaluator: Evaluator
) -> tuple[Widths, Fidelity]:
    """The candidate of best mean over tasks and fresh seeds, and the fidelity that chose it."""
    first = SEARCH_SEEDS[1]
    seeds = range(first, first + config.final_seeds)
    fidelity = recalibration(config.calibration_images)
    finalists = _rank(candidates, tasks, seeds, evaluator, fidelity)[: config.finalists]
    recipe = Recipe(epochs=config.finetune_epochs, lr=config.finetune_lr, precision="fp32")
    fidelity = short_finetune(recipe, config.finetune_images)
    seeds = range(first + config.final_seeds, first + 2 * config.final_seeds)
    return _rank(finalists, tasks, seeds, evaluator, fidelity)[0], fidelity


def _rank(
    candidates: Sequence[Widths],
    tasks: Sequence[Task],
    seeds: Sequence[int],
    evaluator: Evaluator,
    fidelity: Fidelity,
) -> list[Widths]:
    """The candidates, best mean share of the base accuracy over tasks and seeds first."""
    shares = {}
    for widths in candidates:
        shares[widths] = statistics.mean(
            evaluator(task, widths, seed, fidelity) / task.base_accuracy
            for task in tasks
            for seed in seeds
        )
        say(f"{fidelity.name}: {shares[widths]:.3f} of base  {list(widths)}")
    return sorted(candidates, key=lambda widths: -shares[widths])


def _profile(
    config: SearchConfig,
    groups: ChannelGroups,
    widths: Widths,
    tasks: Sequence[Task],
    fidelity: Fidelity,
    evaluator: Evaluator,
    episodes: int,
    started: float,
) -> Profile:
    known = architecture(config.arch)
    search = recalibration(config.calibration_images, config.val_images)
    return Profile(
        architecture=config.arch,
        metric=config.metric,
        cf=config.cf,
        got=cost_model(groups).factor(widths, config.metric),
        reference=Reference(known.num_classes, known.image_size),
        keep_ratios={g.name: w / g.size for g, w in zip(groups.groups, widths, strict=True)},
        kept=dict(zip(groups.names, widths, strict=True)),
        provenance=Provenance(
            command=_command(config),
            agent=f"ppo (Stable-Baselines3), {config.projection} projection, gaussian reward",
            seed=config.seed,
            episodes=episodes,
            evaluations=evaluator.measured + evaluator.replayed,
            seconds=round(time.perf_counter() - started + evaluator.replayed_seconds, 1),
            tasks=tuple(
                f"{task.name} (sha256 {task.network}) on {task.val.name}" for task in tasks
            ),
            split_digest=tasks[0].split_digest,
            fidelity=f"search: {search.name}; choice: {fidelity.name}",
            machine=_machine(),
            date=datetime.date.today().isoformat(),
            versions=_versions(),
        ),
    )


def _command(config: SearchConfig) -> str:
    """The command line of this configuration; absolute paths are shortened to their last part."""
    words = ["zoo", "search"]
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is None:
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{item.name.replace('_', '-')}", *(_relative(str(v)) for v in values)]
    return shlex.join(words)


def _relative(text: str) -> str:
    return Path(text).name if Path(text).is_absolute() else text


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("prunezoo", "torch", "numpy", "gymnasium", "stable-baselines3"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions
