"""The configuration of a search, and the parts that it names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from zoo.errors import ZooError, integer
from zoo.models import architecture, build_model
from zoo.planning.latency import latency_table
from zoo.search.agents import SCREENED, STARTING, Episode, agent
from zoo.search.env import EnvSettings
from zoo.search.tasks import device
from zoo.search.workers import Pool, pool_of
from zoo.spec.cost import CostModel, cost_model
from zoo.spec.groups import ChannelGroups

__all__ = ["SPELLED", "SearchConfig", "cost_of", "parse_budget", "pool_for", "trainer_of"]

_COUNTS = (
    "episodes",
    "screen",
    "workers",
    "episode_images",
    "calibration_images",
    "val_images",
    "candidates",
    "distill_steps",
    "finalists",
    "final_seeds",
    "finetune_epochs",
    "finetune_images",
)

_AGENTS_OF = {
    "std": ("ppo",),
    "features": ("ppo", "ddpg"),
    "observation": ("ppo", "ddpg"),
    "start": STARTING,
    "screen": SCREENED,
}
"""Setting -> the agents that have it, if not all do."""

SPELLED = {"start": "from"}
"""Setting -> its flag, where that is no name in Python."""


@dataclass(frozen=True)
class SearchConfig:
    """The configuration of a search: everything that its profiles depend on."""

    arch: str
    """architecture to search for"""
    tasks: tuple[str, ...]
    """base networks, not trained on the validation split: CHECKPOINT, or CHECKPOINT@DATA"""
    out: Path
    """folder of the ledger, the profiles and the report"""
    cf: tuple[float, ...] = (4.0,)
    """compression factors at the architecture's reference; one profile for each"""
    agent: str = "ppo"
    """ppo, ddpg, gnn, random, cma-es, genetic, swarm or annealing"""
    env: Annotated[EnvSettings, OmitArgPrefixes] = field(default_factory=EnvSettings)
    """what the agent sees, does and is rewarded for"""
    start: Annotated[str | None, arg(name="from")] = None
    """profile to start from: a policy (equal, global, ...), or a reference (bundled:..., file:...),
    which is scaled to each factor; an agent's actions are then corrections of it"""
    episodes: int | None = None
    """number of episodes per factor, by default 320, or what the budget allows; in whole rounds of
    eight, or in whole profiles for agents that play every profile on all tasks"""
    budget: str | None = None
    """wall time of all episodes, as 20m or 1h30m, divided among the factors; the choice is extra"""
    known: tuple[Path, ...] = ()
    """ledgers or folders of other runs, whose evaluations are not repeated"""
    resume: bool = False
    """continue the run in --out"""
    conditioned: bool = False
    """train one agent that observes the factor, instead of one per factor"""
    held_back: tuple[str, ...] = ()
    """base networks to compare finalists on, used by no episode; by default the tasks"""
    data: str = "cifar10"
    """data set of the base networks that name none"""
    data_dir: Path | None = None
    """folder of that data set's files"""
    size: int = 32
    """pixels per side that the images are resized to"""
    seed: int = 0
    """seed of the agent"""
    std: float = 0.3
    """initial standard deviation of PPO's actions, on [-1, 1]"""
    screen: int = 1
    """proposals of the agent for each profile that is played: a random forest, fitted to those
    played so far, chooses; for random, cma-es and annealing"""
    workers: int | None = None
    """processes that evaluate; one per core by default"""
    cluster: str | None = None
    """evaluate on Ray: the address of a cluster, or local"""
    episode_images: int | None = None
    """fine-tune one epoch on this many training images before an episode is measured; by default it
    is only recalibrated"""
    calibration_images: int = 1024
    """training images for the recalibration of a candidate"""
    val_images: int | None = 2000
    """validation images to measure episodes on, if they are only recalibrated"""
    candidates: int = 12
    """number of best distinct profiles to measure again, on all images and with fresh channels"""
    distill_steps: int | None = None
    """distil the better half of the candidates from the dense network for this many steps, to
    choose the finalists among them; by default finalists are the best candidates"""
    finalists: int = 5
    """how many of these get a short fine-tune"""
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
        if integer("seed", self.seed, 0) >= 2**32:
            raise ZooError(
                f"seed must be below 2**32, as NumPy's generators take, got {self.seed}."
            )
        for name, agents in _AGENTS_OF.items():
            holder: Any = self if hasattr(self, name) else self.env
            given, usual = getattr(holder, name), getattr(type(holder), name)
            if self.agent not in agents and given != usual:
                named = f"{SPELLED.get(name, name)} {given}"
                raise ZooError(f"{named} is for {' and '.join(agents)}, not {self.agent}.")
        if self.workers is not None and self.cluster not in (None, "local"):
            raise ZooError("A cluster fixes the number of workers: leave out workers.")
        if not self.cf:
            raise ZooError("A search needs a compression factor: name at least one in cf.")
        if self.budget is not None:
            parse_budget(self.budget)

    @property
    def most_episodes(self) -> int:
        """Most episodes per factor; the budget may end them earlier."""
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
    """The agent's training function, with the settings of the configuration.

    Raises:
        ZooError: for an unknown agent, or one whose library is not installed.
    """
    train = agent(config.agent)
    if config.agent in SCREENED:
        return partial(train, screen=config.screen)
    if config.agent != "ppo":
        return train
    from zoo.search.agents.ppo import PPOSettings

    return partial(train, settings=PPOSettings(std=config.std))


def cost_of(config: SearchConfig, groups: ChannelGroups) -> CostModel:
    """The cost model of the reference; latencies are measured here, or read from the cache."""
    if config.env.metric != "latency":
        return cost_model(groups)
    dense = build_model(config.arch, architecture(config.arch).num_classes).to(device()).eval()
    return cost_model(groups, latency_table(dense, groups))


def pool_for(config: SearchConfig) -> Pool:
    """The pool that evaluates: a cluster, processes, or this process."""
    if config.cluster is None:
        return pool_of(config.workers)
    from zoo.search.cluster import RayPool

    return RayPool(config.cluster, config.workers)
