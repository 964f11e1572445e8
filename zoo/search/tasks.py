"""Tasks: the (base network, data set) pairs of a search, and candidates, which are pruned tasks.

The search sees the training and validation splits alone.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zoo.criteria.scores import (
    Scores,
    channel_scores,
    labelled_batches,
    random_scores,
    taylor_features,
)
from zoo.data.batches import DeviceLoader
from zoo.data.datasets import DATASETS, ImageSet, Splits, load_data
from zoo.errors import ZooError
from zoo.search.ledger import TEST
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan, make_plan
from zoo.storage.dense import load_dense
from zoo.surgery.surgery import apply, named_tensors
from zoo.tracing.known_groups import reference_groups
from zoo.training.finetuning import evaluate

__all__ = [
    "SEARCH_SEEDS",
    "Candidate",
    "Task",
    "check_tasks",
    "cut",
    "device",
    "layer_features",
    "load_task",
    "load_tasks",
    "make_task",
    "plan_of",
    "sample",
    "say",
    "task_data",
]

SEARCH_SEEDS = (1_000, 2**30)
"""Channel seeds that episodes draw from: [first, last). No episode uses any other seed."""


@dataclass(frozen=True)
class Task:
    """One (base network, data set) pair of the search queue.

    Attributes:
        name: its name in reports.
        network: sha256 of the base network's checkpoint, or its name where there is none.
        module: the base network, in eval mode; never changed.
        groups: its channel groups at the data's image size.
        train: images for recalibration and fine-tuning.
        val: images for accuracies, on which the base network was not trained.
        base_accuracy: of the base network on `val`, in [0, 1].
        split_digest: digest of `val`.
        tested: whether `val` are test images, for the final evidence.
        features: E|∂ε/∂L · L| of the base network on `val`, one vector per group.
    """

    name: str
    network: str
    module: nn.Module
    groups: ChannelGroups
    train: ImageSet
    val: ImageSet
    base_accuracy: float
    split_digest: str
    features: tuple[NDArray, ...]
    tested: bool = False

    @cached_property
    def data_digest(self) -> str:
        """sha256 of `train` and `val`, and of how they are normalised and mirrored.

        It stands behind `TEST` if `val` are test images.
        """
        parts = self.train, self.val
        state = [(part.digest(), part.mean, part.std, part.flip) for part in parts]
        digest = hashlib.sha256(repr(state).encode()).hexdigest()
        return f"{TEST}{digest}" if self.tested else digest

    def dense_logits(self, count: int) -> Tensor:
        """The base network's logits (N, classes) for `sample(train, count)`; computed once."""
        if count not in self._logits:
            batches = DeviceLoader(sample(self.train, count), 512, device=device())
            with torch.no_grad():
                self._logits[count] = torch.cat([self.module(images) for images, _ in batches])
        return self._logits[count]

    def scores(self, criterion: str) -> Scores:
        """The base network's channel scores by `criterion`, on `train`; computed once."""
        if criterion not in self._scores:
            batches = labelled_batches(self.train, device(), 0)
            self._scores[criterion] = channel_scores(
                criterion, self.module, self.groups, 0, batches
            )
        return self._scores[criterion]

    @cached_property
    def _logits(self) -> dict[int, Tensor]:
        return {}

    @cached_property
    def _scores(self) -> dict[str, Scores]:
        return {}


@dataclass(frozen=True)
class Candidate:
    """What an evaluation measures: `task` pruned to `widths`.

    The channels are drawn by `seed`, or chosen by another criterion; `seed` is that of the
    training, too.
    """

    task: Task
    widths: tuple[int, ...]
    seed: int
    criterion: str = "random"


def make_task(
    name: str,
    module: nn.Module,
    groups: ChannelGroups,
    train: ImageSet,
    val: ImageSet,
    *,
    network: str | None = None,
    feature_images: int = 1024,
) -> Task:
    """The `Task` of a base network: its validation accuracy and Taylor features are measured.

    Args:
        name, module, groups, train, val: as in `Task`.
        network: sha256 of the checkpoint; `name` by default.
        feature_images: validation images for the features.

    Raises:
        DataError: if a label does not fit the base network's outputs.
        ZooError: if the base network is near chance: less than about 1.5 times its accuracy.
    """
    module = module.to(device()).eval()
    accuracy = evaluate(module, val).accuracy
    classes = len(val.classes)
    if accuracy < (1.5 - 0.5 / classes) / classes:
        raise ZooError(
            f"The base network of {name} has {accuracy:.1%} on the validation split, which is near "
            f"chance for {classes} classes: train it first, or check that it belongs to this data."
        )
    features = layer_features(module, groups, sample(val, feature_images))
    return Task(name, network or name, module, groups, train, val, accuracy, val.digest(), features)


def layer_features(
    module: nn.Module, groups: ChannelGroups, images: ImageSet
) -> tuple[NDArray, ...]:
    """E|∂ε/∂L · L| of `module` on `images`: one float64 vector per group, an entry per channel."""
    vectors = taylor_features(module, groups, DeviceLoader(images, 256, device=device()))
    return tuple(vector.detach().double().cpu().numpy() for vector in vectors)


def check_tasks(tasks: Sequence[Task]) -> None:
    """Refuse an empty queue, and tasks of different architectures.

    Raises:
        ZooError: naming the two tasks whose channel groups differ.
    """
    if not tasks:
        raise ZooError("A search needs at least one task: a base network and its data set.")
    first = tasks[0]
    for task in tasks[1:]:
        if (task.groups.names, task.groups.sizes) != (first.groups.names, first.groups.sizes):
            raise ZooError(
                f"All tasks of a search must have one architecture: {task.name} and {first.name} "
                f"have different channel groups."
            )


def load_tasks(
    arch: str, tasks: Sequence[str], data: str, data_dir: Path | None, size: int
) -> tuple[Task, ...]:
    """The tasks that references name.

    Args:
        arch: the architecture of every base network.
        tasks: references, `CHECKPOINT@DATA`, or `CHECKPOINT` on the data set `data`.
        data, data_dir, size: as in `zoo.data.datasets.load_data`.

    Raises:
        CheckpointError, DataError: when a checkpoint or the data cannot be read.
        ZooError: for no tasks, a base network near chance or one of another validation split.
    """
    if not tasks:
        raise ZooError("A search needs at least one task: name base checkpoints in tasks.")
    splits: dict[str, Splits] = {}
    loaded: list[Task] = []
    for reference in tasks:
        path, name = task_data(reference, data)
        if name not in splits:
            splits[name] = load_data(name, data_dir, size=size)
        task = load_task(arch, path, splits[name])
        before = (task_data(other, data)[0] for other in tasks[: len(loaded)])
        same = sum(Path(other).name == task.name for other in before)
        loaded.append(replace(task, name=f"{task.name} ({same + 1})") if same else task)
    return tuple(loaded)


def task_data(reference: str, data: str) -> tuple[str, str]:
    """`CHECKPOINT@DATA` as its two parts; without `@DATA` the data set is `data`.

    An `@` before anything that is no data set belongs to the checkpoint (`hf:ORG/REPO@REVISION`).
    """
    kinds = "|".join((*DATASETS, "imagefolder:", "hf:"))
    path, *named = re.split(rf"(?<=.)@(?=(?:{kinds})(?:(?<=:).|\[|$))", reference, maxsplit=1)
    return path, named[0] if named else data


def load_task(arch: str, path: str, splits: Splits) -> Task:
    """The task of the base network in the checkpoint at `path`, on the data of `splits`.

    Raises:
        CheckpointError: when the checkpoint cannot be read or is of another architecture.
        ZooError: for a base network near chance, or one of another validation split.
    """
    size = splits.val.image_size
    dense = load_dense(arch, path, image_size=size)
    module, checkpoint = dense.module, dense.checkpoint
    if dense.num_classes != splits.num_classes:
        raise ZooError(
            f"{path} has {dense.num_classes} classes, the data set {splits.val.name} "
            f"{splits.num_classes}."
        )
    held_out = checkpoint.metadata.get("split_digest")
    if held_out is None:
        say(f"{path} does not name the validation split it was not trained on; assuming this one.")
    elif held_out != splits.digest:
        raise ZooError(
            f"{path} was trained with another validation split ({held_out[:12]}) than that "
            f"of {splits.val.name} ({splits.digest[:12]}): it may have seen the images that score "
            f"the search. Train a base network on this data."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}
    own = reference_groups(arch).adapted(shapes, size)
    train, val = splits.train, splits.val
    if not isinstance(train, ImageSet) or not isinstance(val, ImageSet):
        raise ZooError(f"{splits.val.name} is too large for a search, which holds it in memory.")
    return make_task(Path(path).name, module, own, train, val, network=checkpoint.source.sha256)


def sample(data: ImageSet, count: int | None) -> ImageSet:
    """`count` images of `data`, or all of them, in a fixed random order (seed 0)."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data.subset(order[:count])


def plan_of(candidate: Candidate) -> Plan:
    """The plan of a candidate; for one seed, the channels of a smaller width are a subset."""
    groups, seed, criterion = candidate.task.groups, candidate.seed, candidate.criterion
    drawn = criterion == "random"
    return make_plan(
        groups,
        dict(zip(groups.names, candidate.widths, strict=True)),
        random_scores(groups, seed) if drawn else candidate.task.scores(criterion),
        profile="search",
        metric="params",
        asked=1.0,
        criterion=criterion,
        seed=seed,
    )


def cut(candidate: Candidate) -> nn.Module:
    """The pruned network of a candidate."""
    return apply(candidate.task.module, candidate.task.groups, plan_of(candidate))


def device() -> torch.device:
    """Where networks are measured: CUDA when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def say(text: str) -> None:
    """Print a line of progress to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
