"""What each stage of a plan does, from base networks to certified profiles.

A job writes into its own folder. A killed job continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zoo.common.documents import decode, read_json, write_json
from zoo.data.datasets import Splits, load_data
from zoo.errors import FactorError, ZooError
from zoo.loading import create_model
from zoo.planning.best import best_policies
from zoo.planning.learned import LEARNED, learned_policy
from zoo.planning.policies import policy_solution
from zoo.search.agents import STARTING
from zoo.search.certificate import certify, everywhere, rank
from zoo.search.env import EnvSettings
from zoo.search.evaluation import Evaluator
from zoo.search.evidence import evidence, examined, policy_widths
from zoo.search.fidelities import FineTuning, FromScratch, Recalibration
from zoo.search.ledger import FILE, Ledger, read
from zoo.search.run import search_profile
from zoo.search.schedule import DRAWS, FIGURES, Job
from zoo.search.settings import SearchConfig
from zoo.search.tasks import Candidate, Task, load_task, say
from zoo.spec.cost import CostModel, cost_model
from zoo.spec.profile import STANDARD, Evidence, Profile
from zoo.storage.artefacts import save_checkpoint
from zoo.storage.checkpoints import read_safetensors
from zoo.tracing.known_groups import reference_groups
from zoo.training.finetuning import evaluate, finetune
from zoo.training.recipes import Recipe

__all__ = ["BASE", "PROFILE", "ROWS", "Workshop", "check_results", "perform"]

BASE = "base.safetensors"
"""The file of a base network in its job's folder; its weights are of half precision."""
ROWS = "evidence.json"
"""The file of the evidence in its job's folder."""
PROFILE = "profile.json"
"""The file of the profile with its evidence in its certificate's folder."""

SEARCHED = "searched"
"""The policy whose evidence is the profile's own."""

Widths = tuple[int, ...]

SHORT = FineTuning.of(1, 10_000, 0.05)
"""The fine-tune of random profiles, which are measured after a recalibration too."""


@dataclass(frozen=True)
class Workshop:
    """The folders and data that jobs use.

    Attributes:
        out: the folder of the jobs' folders.
        data_dir: the folder of all data sets.
        data: as in `Plan`.
        merged: folders of results from other machines, laid out as `out` is.
        known: ledgers, whose evaluations are not repeated.
    """

    out: Path
    data_dir: Path
    data: Mapping[str, str]
    merged: tuple[Path, ...] = ()
    known: tuple[Path, ...] = ()

    def reference(self, base: str) -> str:
        """The data set of a base network, as `zoo.load_data` names it."""
        name = base.rpartition("-")[0]
        return self.data[name].format(dir=self.data_dir)

    def splits(self, job: Job, base: str) -> Splits:
        return load_data(self.reference(base), self.data_dir, size=job.network.size)

    def found(self, job: str, file: str) -> Path:
        """The path of a file that a finished job wrote.

        Raises:
            ZooError: if no folder has it.
        """
        for folder in (self.out, *self.merged):
            if (folder / job / file).is_file():
                return folder / job / file
        raise ZooError(f"{job} is done, but its {file} is not here: copy it, or run the job again.")

    def checkpoint(self, job: Job, base: str) -> Path:
        """The file of a base network that the job needs."""
        (name,) = (n for n in job.needs if n.startswith("base/") and n.endswith(f"/{base}"))
        return self.found(name, BASE)

    def ledger(self, job: Job) -> Ledger:
        """The job's ledger, which knows those of the jobs that it needs."""
        own = (self.out / name / FILE for name in job.needs)
        known = read([*self.known, *(path for path in own if path.exists())])
        return Ledger(self.out / job.name / FILE, known=known)

    def profile(self, job: Job, agent: str) -> Profile:
        """What an agent found in the search that the job needs."""
        (search,) = (name for name in job.needs if name.startswith("search/"))
        return Profile.read(self.found(search, f"{agent}.json"))

    def task(self, job: Job, base: str) -> Task:
        return load_task(job.network.arch, str(self.checkpoint(job, base)), self.splits(job, base))

    def exam(self, job: Job, base: str) -> Task:
        """A base network that nothing was learnt on, measured on test images.

        Raises:
            ZooError: if the learned policy, from which searches start, was trained on it.
        """
        task = self.task(job, base)
        if task.network in learned_policy(LEARNED).training.networks:
            raise ZooError(f"{base} of {job.network.arch} cannot be an exam: `learned` saw it.")
        return examined(task, self.splits(job, base).test)  # type: ignore[arg-type]

    def measured(self, job: Job) -> Task:
        """The job's base network: on test images if it is an exam, else on validation images."""
        return (self.exam if job.base in job.network.exams else self.task)(job, job.base)


def perform(job: Job, workshop: Workshop) -> None:
    """Run one job, after the jobs that it needs.

    Raises:
        ZooError: as `load_data`, `finetune` and the search do.
    """
    _STAGES[job.stage](job, workshop)


def check_results(job: Job, folder: Path) -> None:
    """Read the files that a finished job has in its folder.

    Raises:
        ZooError: if one is missing or damaged.
    """
    match job.stage:
        case "base":
            read_safetensors(folder / BASE)
        case "search":
            for agent in job.network.agents:
                Profile.read(folder / f"{agent}.json")
        case "evidence" | "recipe":
            _read_rows(folder / ROWS)
        case "certificate":
            Profile.read(folder / PROFILE)
        case "ledger" | "figures":
            if not (folder / FILE).is_file():
                raise ZooError(f"{folder / FILE} does not exist.")


def _base(job: Job, workshop: Workshop) -> None:
    """Train a dense network on the training split alone, to its last epoch."""
    network, seed = job.network, int(job.base.rpartition("-")[2])
    splits, folder = workshop.splits(job, job.base), workshop.out / job.name
    start = network.pretrained and network.pretrained.format(dir=workshop.data_dir)
    model = create_model(
        network.arch, splits.num_classes, pretrained=start, image_size=network.size, seed=seed
    )
    recipe = Recipe(epochs=network.epochs, lr=network.lr)
    result = finetune(
        model, splits.train, None, teacher=None, recipe=recipe, seed=seed, progress=False,
        checkpoint=folder / "training", resume=True,
    )  # fmt: skip
    if result.interrupted:
        raise KeyboardInterrupt
    model.half().float()  # measure the half-precision weights that are saved
    metadata = {
        "architecture": network.arch,
        "num_classes": str(splits.num_classes),
        "image_size": str(network.size),
        "data": splits.train.name,
        "split_digest": splits.digest,
        "val_accuracy": f"{evaluate(model, splits.val).accuracy:.4f}",
        "test_accuracy": f"{evaluate(model, splits.test).accuracy:.4f}",
        "epochs": str(network.epochs),
        **({"pretrained": Path(start).name} if start else {}),
        "seed": str(seed),
    }
    save_checkpoint(model.half(), folder / BASE, metadata)


def _ledger(job: Job, workshop: Workshop) -> None:
    """Random profiles of one factor, after a recalibration and after a short fine-tune."""
    with workshop.ledger(job) as ledger:
        evaluator = Evaluator(ledger)
        for candidate in _random(job, workshop.measured(job)):
            for fidelity in (Recalibration(), SHORT):  # one by one, so that the order is random
                evaluator([candidate], fidelity, "random")


def _random(job: Job, task: Task) -> list[Candidate]:
    cost = _cost(job)
    return [
        Candidate(task, policy_solution("random", cost, job.cf, job.metric, seed).widths, seed)
        for seed in range(job.network.random)
    ]


def _figures(job: Job, workshop: Workshop) -> None:
    """What the paper's figures 1 to 3 compare."""
    network, task, cost = job.network, workshop.measured(job), _cost(job)
    fidelities = {
        kept: kind.of(network.finetune_epochs, network.finetune_images, 0.05)
        for kept, kind in ((True, FineTuning), (False, FromScratch))
    }
    with workshop.ledger(job) as ledger:
        evaluator = Evaluator(ledger)
        for policy, criterion, kept in FIGURES:
            try:
                widths = policy_solution(policy, cost, job.cf, job.metric).widths
            except FactorError as error:  # decreasing profiles keep the large last layers
                say(f"{policy}: {error}")
                continue
            candidates = [Candidate(task, widths, seed, criterion) for seed in network.seeds]
            evaluator(candidates, fidelities[kept], policy)
            if kept and criterion == "random":  # beside the random profiles of `_ledger`
                evaluator(candidates, SHORT, policy)


def _search(job: Job, workshop: Workshop) -> None:
    """Search by every agent on the same terms."""
    network, folder = job.network, workshop.out / job.name

    def references(bases: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{workshop.checkpoint(job, b)}@{workshop.reference(b)}" for b in bases)

    for number, name in enumerate(network.agents):
        earlier = (folder / other / FILE for other in network.agents[:number])
        (profile,) = search_profile(
            SearchConfig(
                arch=network.arch,
                tasks=references(network.tasks),
                held_back=references(network.held_back),
                out=folder / name,
                cf=(job.cf,),
                agent=name,
                env=EnvSettings(metric=job.metric, draws=network.draws),  # type: ignore[arg-type]
                episodes=network.episodes,
                start=network.start if name in STARTING else None,
                distill_steps=network.distill_steps,
                resume=True,
                data_dir=workshop.data_dir,
                size=network.size,
                workers=1,
                known=(*workshop.known, *earlier),
            )
        )
        profile.write(folder / f"{name}.json")


def _evidence(job: Job, workshop: Workshop) -> None:
    """Measure every policy, and what the agents found if they searched, on one exam."""
    network, exam, cost = job.network, workshop.exam(job, job.base), _cost(job)
    policies: dict[str, Widths] = {}
    for number, agent in enumerate(network.agents if network.tasks else ()):
        policies[agent if number else SEARCHED] = _widths(workshop.profile(job, agent))
    policies |= policy_widths(network.policies, exam, cost, job.cf, job.metric)
    fidelity = FineTuning.of(network.finetune_epochs, network.finetune_images, 0.05)
    sibling = None
    if network.sibling:
        tuned = network.finetune_epochs * network.finetune_images / len(exam.train)
        sibling = FromScratch.of(network.epochs + round(tuned), None, network.lr)
    with workshop.ledger(job) as ledger:
        rows = evidence(
            policies, exam, Evaluator(ledger), fidelity, network.seeds, cost, sibling=sibling
        )
    write_json(workshop.out / job.name / ROWS, rows)


def _recipe(job: Job, workshop: Workshop) -> None:
    """What a user gets: the searched profile and `best`, after the recipe `standard`, taught."""
    network, exam, cost = job.network, workshop.exam(job, job.base), _cost(job)
    policies: dict[str, Widths] = {}
    if network.tasks:
        policies[SEARCHED] = _widths(workshop.profile(job, network.agents[0]))
    if network.recipe_best or not network.tasks:
        (best, *_) = best_policies(job.metric, job.cf, data=True, arch=network.arch)
        policies |= policy_widths([best], exam, cost, job.cf, job.metric)
    fidelity = FineTuning.standard(network.lr, network.recipe_epochs)
    named = {f"{name}{STANDARD}": widths for name, widths in policies.items()}
    with workshop.ledger(job) as ledger:
        rows = evidence(named, exam, Evaluator(ledger), fidelity, network.seeds[:1], cost)
    write_json(workshop.out / job.name / ROWS, rows)


def _certificate(job: Job, workshop: Workshop) -> None:
    """Rank the first agent's profile among random ones, and add all its evidence to it."""
    profile = workshop.profile(job, job.network.agents[0])
    ranks = []
    with workshop.ledger(job) as ledger:
        evaluator = Evaluator(ledger)
        for base in job.network.ranked:
            task = workshop.exam(job, base)
            own = [Candidate(task, _widths(profile), seed) for seed in range(DRAWS)]
            accuracy = statistics.fmean(evaluator(own, SHORT, SEARCHED))
            random = evaluator(_random(job, task), SHORT, "random")
            data, network = f"{task.val.name}, test split", task.network
            ranks.append(
                rank(accuracy, random, data=data, fidelity=SHORT.name, network=network, draws=DRAWS)
            )
    rows, tuned = (_rows(job, workshop, stage) for stage in ("evidence", "recipe"))
    profile = dataclasses.replace(
        profile,
        evidence=(*rows, *(row for row in tuned if row.standard)),
        certificate=certify(everywhere(rows), ranks, policy=SEARCHED),
    )
    profile.write(workshop.out / job.name / PROFILE)


def _rows(job: Job, workshop: Workshop, stage: str) -> list[Evidence]:
    """The evidence of all jobs of a stage that the job needs."""
    found: list[Evidence] = []
    for name in job.needs:
        if name.startswith(f"{stage}/"):
            found += _read_rows(workshop.found(name, ROWS))
    return found


def _read_rows(path: Path) -> tuple[Evidence, ...]:
    return decode(tuple[Evidence, ...], read_json(path), str(path))


def _widths(profile: Profile) -> Widths:
    return tuple(profile.kept[group] for group in reference_groups(profile.architecture).names)


def _cost(job: Job) -> CostModel:
    return cost_model(reference_groups(job.network.arch))


_STAGES: dict[str, Callable[[Job, Workshop], None]] = {
    "base": _base,
    "ledger": _ledger,
    "figures": _figures,
    "search": _search,
    "evidence": _evidence,
    "recipe": _recipe,
    "certificate": _certificate,
}
