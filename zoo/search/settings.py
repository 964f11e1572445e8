"""What a search is asked to do: its configuration, and the parts that this names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes

from zoo.errors import ZooError, integer
from zoo.models import architecture, build_model
from zoo.planning.latency import latency_table
from zoo.search.agents import Episode, agent
from zoo.search.env import EnvSettings
from zoo.search.tasks import device
from zoo.search.workers import Pool, pool_of
from zoo.spec.cost import CostModel, cost_model
from zoo.spec.groups import ChannelGroups

__all__ = ["SearchConfig", "cost_of", "parse_budget", "pool_for", "trainer_of"]

_COUNTS = (
    "episodes",
    "workers",
    "episode_images",
    "calibration_images",
    "val_images",
    "candidates",
    "finalists",
    "final_seeds",
    "finetune_epochs",
    "finetune_images",
)

_AGENTS_OF = {"std": ("ppo",), "features": ("ppo", "ddpg"), "observation": ("ppo", "ddpg")}
"""Settings that some agents alone have."""


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
    episodes: int | None = None
    """most evaluations per factor, in whole rounds of eight or, where an agent plays every profile
    on all tasks, whole profiles; by default 320, or what the budget allows"""
    budget: str | None = None
    """wall time of all episodes, as 20m or 1h30m, in equal parts; choosing comes on top"""
    known: tuple[Path, ...] = ()
    """ledgers or folders of other runs, whose evaluations are not made again"""
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
    episode_images: int | None = None
    """training images of a fine-tune of one epoch before an episode is measured; by default it is
    recalibrated alone"""
    calibration_images: int = 1024
    """training images for the recalibration of a candidate"""
    val_images: int | None = 2000
    """validation images that episodes are measured on, after a recalibration alone"""
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
    """peak learning rate of every fine-tune"""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)
        for name in ("std", "finetune_lr"):
            if not getattr(self, name) > 0:
                raise ZooError(f"{name} must be positive, got {getattr(self, name)}.")
        integer("seed", self.seed, 0)
        for name, agents in _AGENTS_OF.items():
            holder: Any = self if hasattr(self, name) else self.env
            given, usual = getattr(holder, name), getattr(type(holder), name)
            if self.agent not in agents and given != usual:
                raise ZooError(f"{name} {given} is for {' and '.join(agents)}, not {self.agent}.")
        if self.workers is not None and self.cluster not in (None, "local"):
            raise ZooError("A cluster has the workers that it has: leave out workers.")
        if not self.cf:
            raise ZooError("A search needs a compression factor: name at least one in cf.")
        if self.budget is not None:
            parse_budget(self.budget)

    @property
    def most_episodes(self) -> int:
        """Per factor, the budget apart."""
        return self.episodes or (320 if self.budget is None else 10_000)


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


def trainer_of(config: SearchConfig) -> Callable[..., list[Episode]]:
    """The agent's learning loop, with what the configuration says of it.

    Raises:
        ZooError: for an unknown agent, or one whose library is not installed.
    """
    train = agent(config.agent)
    if config.agent != "ppo":
        return train
    from zoo.search.agents.ppo import PPOSettings

    return partial(train, settings=PPOSettings(std=config.std))


def cost_of(config: SearchConfig, groups: ChannelGroups) -> CostModel:
    """Costs of the reference; for latency its layers are timed here, or remembered."""
    if config.env.metric != "latency":
        return cost_model(groups)
    dense = build_model(config.arch, architecture(config.arch).num_classes).to(device()).eval()
    return cost_model(groups, latency_table(dense, groups))


def pool_for(config: SearchConfig) -> Pool:
    """What evaluates: a cluster, processes, or this process."""
    if config.cluster is None:
        return pool_of(config.workers)
    from zoo.search.cluster import RayPool

    return RayPool(config.cluster, config.workers)
