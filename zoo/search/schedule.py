"""A plan of long computations as jobs.

A plan says which results the zoo should have. A job needs other jobs, and has a value.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zoo.common.documents import decode
from zoo.errors import DocumentError, ZooError, integer, unknown
from zoo.models import architecture
from zoo.planning.learned import LEARNED
from zoo.planning.policies import POLICIES
from zoo.planning.rankings import RANKINGS
from zoo.registry.store import folder_name
from zoo.search.agents import AGENTS
from zoo.spec.cost import cost_model
from zoo.tracing.known_groups import reference_groups
from zoo.training.recipes import RECIPES

__all__ = ["DRAWS", "FIGURES", "Job", "Network", "Plan", "jobs_of"]

Stage = Literal["base", "ledger", "figures", "search", "evidence", "recipe", "certificate"]

WORTH: dict[Stage, float] = {
    "base": 1.0,
    "certificate": 0.98,
    "evidence": 0.97,
    "recipe": 0.96,
    "search": 0.96,
    "figures": 0.95,
    "ledger": 0.94,
}
"""The value of each stage, as a share of its network's value.

They are close, so that one network is finished before the next is begun. A profile goes into the
registry with its certificate; whatever that needs is worth as much.
"""

FIGURES = (
    ("equal", "random", True),
    ("equal", "random", False),
    ("equal", "l1", True),
    ("equal", "taylor", True),
    ("increasing", "random", True),
    ("decreasing", "random", True),
)
"""What the paper's figures 1 to 3 compare: policy, channels, and whether weights are kept."""

DRAWS = 8
"""Choices of channels that a ranked profile's accuracy is the mean of: one may be unlucky."""

IMAGES = 45_000
"""Images of a training split, where the plan does not say how many there are."""


@dataclass(frozen=True)
class Network:
    """The wanted results for one architecture at one image size.

    Attributes:
        arch, size: a registered architecture, and the images' pixels per side.
        value: of these results, relative to the other networks'.
        bases: data set of the plan -> number of base networks trained on it, by as many seeds.
        pretrained: the checkpoint that they are trained from, as `zoo.create_model` takes it;
            `{dir}` stands for the folder of all data. If left out, from random weights.
        epochs: of their training.
        lr: its peak learning rate.
        tasks, held_back: base networks, as `cifar10-0`, that searches see; no tasks, no search.
        exams: base networks that no search sees, for evidence; two or more for a certificate.
        ledger: base networks that random profiles are measured on; on those of `exams`, with test
            images, and searched profiles are ranked among them, for their certificates.
        figures: base networks that the paper's comparisons of initialisations, channels and
            handmade profiles are measured on, as in `ledger`, by the first metric.
        recipe: base networks that no search sees, on which the searched profile is fine-tuned as
            users do: by the recipe `standard`, with the dense network as teacher.
        recipe_best: whether `best` is too, beside it. Where nothing is searched, it is alone.
        recipe_epochs: of that recipe, if not its own.
        random: number of random profiles for each metric and factor.
        metrics, cf: metrics and compression factors of the profiles.
        agents: those that search, on the same terms; the first one's profile goes into the
            registry, the others' are its rivals.
        episodes: of a search.
        start: the profile that searches start from, as `zoo search --from` takes it; none if left
            out.
        draws: of channels, for each profile that a search plays.
        distill_steps: to choose among the best of a search, as `zoo search --distill-steps`.
        policies: measured beside the searched profile; those that rank channels too.
        sibling: whether a network of the widths of `equal` is trained from scratch, beside them, on
            as many images as base network and fine-tune together.
        seeds: of the channels and the fine-tunes of the evidence.
        finetune_epochs, finetune_images: of those fine-tunes.
    """

    arch: str
    size: int
    value: float
    bases: dict[str, int]
    epochs: int
    lr: float = 0.1
    pretrained: str | None = None
    tasks: tuple[str, ...] = ()
    held_back: tuple[str, ...] = ()
    exams: tuple[str, ...] = ()
    ledger: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()
    recipe_best: bool = True
    recipe_epochs: int = RECIPES["standard"].epochs
    random: int = 100
    metrics: tuple[str, ...] = ("params", "macs")
    cf: tuple[float, ...] = (2.0, 4.0, 6.0)
    agents: tuple[str, ...] = ("ppo", "cma-es")
    episodes: int = 320
    start: str | None = None
    draws: int = 1
    distill_steps: int | None = None
    policies: tuple[str, ...] = (
        "equal",
        "increasing",
        "learned",
        "global",
        "global-fisher-per-cost",
        "global-bn",
        "global-lamp",
        "knapsack",
    )
    sibling: bool = False
    seeds: tuple[int, ...] = (0, 1)
    finetune_epochs: int = 10
    finetune_images: int = 10_000

    def __post_init__(self) -> None:
        for name in (
            "size", "epochs", "recipe_epochs", "random", "episodes", "draws", "finetune_epochs",
            "finetune_images",
        ):  # fmt: skip
            integer(f"{self.arch}'s {name}", getattr(self, name), 1)
        for name, numbers, least in (
            ("value", (self.value,), 0), ("lr", (self.lr,), 0), ("cf", self.cf, 1),
        ):  # fmt: skip
            if not all(least < number < float("inf") for number in numbers):
                raise ZooError(f"{self.arch}'s {name} must be over {least}, got {numbers}.")
        for name, given, known in (
            ("metric", self.metrics, ("params", "macs")),
            ("policy", self.policies, (*POLICIES, *RANKINGS, LEARNED)),
            ("agent", self.agents, AGENTS),
        ):
            for value in given:
                if value not in known:
                    raise unknown(f"{self.arch}'s {name}", value, known)
        if not self.seeds:
            raise ZooError(f"{self.arch} has no seeds.")
        if self.sibling and "equal" not in self.policies:
            raise ZooError(f"{self.arch}'s sibling has the widths of 'equal': add it to policies.")

    @property
    def seen(self) -> set[str]:
        """The base networks that searches see."""
        return {*self.tasks, *self.held_back}

    @property
    def ranked(self) -> tuple[str, ...]:
        """The base networks of `ledger` that are exams."""
        return tuple(base for base in self.ledger if base in self.exams)

    @property
    def has_certificates(self) -> bool:
        """Whether profiles are searched, measured and ranked, and so get a certificate."""
        return bool(self.tasks and self.ranked)


@dataclass(frozen=True)
class Plan:
    """Networks, and the data sets that they name.

    Attributes:
        data: name -> its reference for `zoo.load_data`; `{dir}` stands for the folder of all data.
        network: the networks, in any order.
        images: name -> images of its training split, from which costs are estimated; `IMAGES` if
            left out.
    """

    data: dict[str, str]
    network: tuple[Network, ...]
    images: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a TOML file.

        Raises:
            DocumentError: for a file that is missing, malformed or inconsistent.
        """
        try:
            plan = decode(cls, tomllib.loads(path.read_text()), str(path))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise DocumentError(f"{path} is no plan: {error}") from None
        for name in plan.images.keys() - plan.data.keys():
            raise DocumentError(f"{path} counts the images of {name!r}: not in [data].")
        for number, network in enumerate(plan.network):
            if any((n.arch, n.size) == (network.arch, network.size) for n in plan.network[:number]):
                raise DocumentError(f"{path} has {network.arch} at {network.size} pixels twice.")
            for name in network.bases:
                if name not in plan.data:
                    raise DocumentError(
                        f"{path}: {network.arch} names the data {name!r}: not in [data]."
                    )
            known = set(_bases(network))
            for name in (
                *network.tasks,
                *network.held_back,
                *network.exams,
                *network.ledger,
                *network.figures,
                *network.recipe,
            ):
                if name not in known:
                    raise DocumentError(f"{path}: {network.arch} has no base network {name!r}.")
            if seen := network.seen & {*network.exams, *network.recipe}:
                raise DocumentError(
                    f"{path}: searches of {network.arch} see the exam {min(seen)!r}."
                )
            if network.has_certificates and len(network.exams) < 2:
                raise DocumentError(
                    f"{path}: {network.arch} has one exam; a certificate needs two, or no exam in "
                    f"`ledger`."
                )
        return plan


@dataclass(frozen=True)
class Job:
    """One computation, which can be interrupted and continued.

    Attributes:
        name: its folder, as `base/resnet20-16/16/cifar10-0`.
        stage, network: the stage, and the network that it is done for.
        base: the base network that it trains or measures, as `cifar10-0`.
        metric, cf: of the profiles that it finds or measures.
        needs: names of the jobs that must be done before.
        work: in 10^12 MACs of the dense network; a training pass counts three times.
        value: of the job itself, without the jobs that need it.
    """

    name: str
    stage: Stage
    network: Network
    needs: tuple[str, ...]
    work: float
    value: float
    base: str = ""
    metric: str = ""
    cf: float = 0.0


def jobs_of(plan: Plan) -> dict[str, Job]:
    """The jobs of a plan by name, each after those that it needs."""
    return {job.name: job for network in plan.network for job in _jobs(network, plan.images)}


def _jobs(network: Network, counts: Mapping[str, int]) -> Iterator[Job]:
    place, macs = f"{folder_name(network.arch)}/{network.size}", _macs(network)

    def trained_on(base: str) -> int:
        return counts.get(base.rpartition("-")[0], IMAGES)

    def bases(*names: str) -> tuple[str, ...]:
        return tuple(f"base/{place}/{name}" for name in names)

    def job(stage: Stage, part: str, needs: tuple[str, ...], images: float, **own: object) -> Job:
        value = network.value * WORTH[stage]
        name = f"{stage}/{place}/{part}"
        return Job(name, stage, network, needs, images * macs, value, **own)  # type: ignore[arg-type]

    for base in _bases(network):
        yield job("base", base, (), 3 * trained_on(base) * network.epochs, base=base)
    for metric in network.metrics:
        for cf in network.cf:
            profile = f"{metric}-cf{cf:g}"
            cut = 1 / cf**0.5  # share of the dense network's time at factor cf
            own = {"metric": metric, "cf": cf}
            if network.tasks:
                seen = bases(*network.tasks, *network.held_back)
                images = len(network.agents) * cut * _searching(network)
                yield job("search", profile, seen, images, **own)
            for base in network.ledger:
                images = network.random * cut * (3 * 10_000 + 7_000)
                yield job("ledger", f"{profile}/{base}", bases(base), images, base=base, **own)
            for base in network.figures if metric == network.metrics[0] else ():
                runs = len(FIGURES) * len(network.seeds)
                images = runs * cut * 3 * network.finetune_epochs * network.finetune_images
                yield job("figures", f"{profile}/{base}", bases(base), images, base=base, **own)
            found = (f"search/{place}/{profile}",) if network.tasks else ()
            for base in network.exams:
                runs = len(network.seeds) * (len(network.policies) + 1)
                images = runs * cut * 3 * network.finetune_epochs * network.finetune_images
                if network.sibling:
                    images += cut * 3 * trained_on(base) * network.epochs
                needs = (*bases(base), *found)
                yield job("evidence", f"{profile}/{base}", needs, images, base=base, **own)
            for base in network.recipe:
                runs = 2 if network.tasks and network.recipe_best else 1
                images = runs * (3 * cut + 1) * trained_on(base) * network.recipe_epochs
                needs = (*bases(base), *found)
                yield job("recipe", f"{profile}/{base}", needs, images, base=base, **own)
            if network.has_certificates:
                measured = (f"evidence/{place}/{profile}/{base}" for base in network.exams)
                tuned = (f"recipe/{place}/{profile}/{base}" for base in network.recipe)
                random = (f"ledger/{place}/{profile}/{base}" for base in network.ranked)
                needs = (*bases(*network.ranked), *found, *measured, *tuned, *random)
                images = DRAWS * len(network.ranked) * cut * 3 * 10_000
                yield job("certificate", profile, needs, images, **own)


def _searching(network: Network) -> int:
    """Images of one agent's search, roughly: its episodes, then the choice among their best."""
    choice = 30 * 6_000 + 10 * 3 * 10_000 + 14 * 3 * 128 * (network.distill_steps or 0)
    return network.episodes * network.draws * 3_000 + len(network.tasks) * choice


def _bases(network: Network) -> list[str]:
    return [f"{data}-{seed}" for data, count in network.bases.items() for seed in range(count)]


def _macs(network: Network) -> float:
    """MACs of the dense network for one image at the network's size, in 10^12."""
    macs = cost_model(reference_groups(network.arch)).dense.macs
    return macs * (network.size / architecture(network.arch).image_size) ** 2 / 1e12
