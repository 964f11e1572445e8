"""Tasks, and the accuracy of a pruned network on them at several fidelities.

The search sees the training and validation splits alone. Channels are chosen at random from a seed;
the kept sets of one seed are nested in the width.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat

import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.data import DeviceLoader, ImageSet
from zoo.documents import encode
from zoo.errors import ZooError
from zoo.groups import ChannelGroups
from zoo.pruning.criteria import random_scores, taylor_features
from zoo.pruning.plan import make_plan
from zoo.pruning.surgery import apply
from zoo.search.ledger import Key, Ledger, Row
from zoo.training import Recipe, evaluate, finetune

__all__ = [
    "SEARCH_SEEDS",
    "Evaluator",
    "Fidelity",
    "Task",
    "check_tasks",
    "cut",
    "make_task",
    "recalibrate",
    "recalibrated_accuracy",
    "recalibration",
    "sample",
    "say",
    "short_finetune",
    "short_finetune_accuracy",
]

SEARCH_SEEDS = (1_000, 2**30)
"""Channel seeds that episodes draw from: [first, last). Other seeds are fresh to every search."""

CRITERION = "random"
SGD_STEPS = 50
"""Most steps that recalibrate a network without batch norm."""


@dataclass(frozen=True)
class Task:
    """One (base network, data set) pair of the search queue.

    Attributes:
        name: what reports call it.
        network: sha256 of the base network's checkpoint, or its name where there is none.
        module: the base network, in eval mode; never changed.
        groups: its channel groups at the data's image size.
        train: images for recalibration and fine-tuning.
        val: images for accuracies, on which the base network was not trained.
        base_accuracy: of the base network on `val`, in [0, 1].
        split_digest: of `val`.
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
        ZooError: if the base network is near chance (below 1.5 / classes).
    """
    module = module.to(_device()).eval()
    accuracy = evaluate(module, val).accuracy
    classes = len(val.classes)
    if accuracy < 1.5 / classes:
        raise ZooError(
            f"The base network of {name} has {accuracy:.1%} on the validation split, which is near "
            f"chance for {classes} classes: train it first, or check that it belongs to this data."
        )
    batches = DeviceLoader(sample(val, feature_images), 256, device=_device())
    features = taylor_features(module, groups, batches)
    vectors = tuple(vector.detach().double().cpu().numpy() for vector in features)
    digest = val.digest()
    return Task(name, network or name, module, groups, train, val, accuracy, digest, vectors)


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


def sample(data: ImageSet, count: int | None) -> ImageSet:
    """`count` images of `data` chosen once and for all (seed 0), or all of them; shuffled."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data.subset(order[:count])


def cut(task: Task, widths: Sequence[int], seed: int) -> nn.Module:
    """The task's network pruned to `widths`, with channels chosen at random from `seed`."""
    plan = make_plan(
        task.groups,
        dict(zip(task.groups.names, widths, strict=True)),
        random_scores(task.groups, seed),
        profile="search",
        metric="params",
        asked=1.0,
        criterion=CRITERION,
        seed=seed,
    )
    return apply(task.module, task.groups, plan)


def recalibrate(module: nn.Module, dense: nn.Module, train: ImageSet) -> None:
    """Repair, in place and without real training, what pruning did to a network's activations.

    Batch-norm statistics are recomputed over `train`. A network without batch norm has the inputs
    of each layer rescaled by dense / kept inputs and takes at most `SGD_STEPS` small SGD steps.

    Args:
        module: the pruned network.
        dense: the network that it was cut from, with the same parameter names.
        train: the calibration images; they are not augmented.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if norms:
        _reset_statistics(module, norms, train)
        return
    shapes = {name: parameter.shape for name, parameter in dense.named_parameters()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(shapes[name][1] / parameter.shape[1])
    _small_steps(module, train)


def _reset_statistics(module: nn.Module, norms: list[_BatchNorm], train: ImageSet) -> None:
    module.eval()
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    batch = min(512, len(train))
    with torch.no_grad():
        for images, _ in DeviceLoader(train, batch, device=_device(), drop_last=True):
            module(images.to(memory_format=torch.channels_last))
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    module.eval()


def _small_steps(module: nn.Module, train: ImageSet) -> None:
    """Up to `SGD_STEPS` steps of SGD, with a learning rate that falls linearly to zero."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / SGD_STEPS)
    batches = DeviceLoader(train, min(128, len(train)), device=_device(), drop_last=True)
    module.train()
    passes = chain.from_iterable(repeat(batches))
    for images, labels in islice(passes, SGD_STEPS):
        loss = functional.cross_entropy(
            module(images.to(memory_format=torch.channels_last)), labels
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        fall.step()
    module.eval()


def recalibrated_accuracy(
    task: Task,
    widths: Sequence[int],
    *,
    seed: int,
    calibration_images: int = 2048,
    val_images: int | None = None,
) -> float:
    """Validation accuracy in [0, 1] after surgery and `recalibrate`, with no real training.

    Args:
        task: the base network and its data.
        widths: channels to keep, per group in order.
        seed: of the channels kept.
        calibration_images: training images for the recalibration.
        val_images: validation images to measure on; all by default.
    """
    module = cut(task, widths, seed).to(_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    recalibrate(module, task.module, sample(task.train, calibration_images))
    return evaluate(module, sample(task.val, val_images)).accuracy


def short_finetune_accuracy(
    task: Task, widths: Sequence[int], *, seed: int, recipe: Recipe, train_images: int | None = None
) -> float:
    """Validation accuracy in [0, 1] after surgery and a fine-tune of the task's training images.

    Args:
        task: the base network and its data.
        widths: channels to keep, per group in order.
        seed: of the channels kept, and of the training.
        recipe: how to train.
        train_images: training images to use; all by default.

    Raises:
        KeyboardInterrupt: when the training was interrupted; there is no accuracy then.
    """
    module = cut(task, widths, seed)
    train = sample(task.train, train_images)
    result = finetune(module, train, task.val, recipe=recipe, seed=seed, progress=False)
    if result.interrupted:
        raise KeyboardInterrupt
    return result.accuracy


@dataclass(frozen=True)
class Fidelity:
    """How accuracies are measured: `measure(task, widths, seed)`, and a name with its settings."""

    name: str
    measure: Callable[[Task, Sequence[int], int], float]


def recalibration(calibration_images: int = 2048, val_images: int | None = None) -> Fidelity:
    """The fidelity of `recalibrated_accuracy`."""
    return Fidelity(
        f"recalibration, {calibration_images} training images, {val_images or 'all'} validation "
        "images",
        lambda task, widths, seed: recalibrated_accuracy(
            task,
            widths,
            seed=seed,
            calibration_images=calibration_images,
            val_images=val_images,
        ),
    )


def short_finetune(recipe: Recipe, train_images: int | None = None) -> Fidelity:
    """The fidelity of `short_finetune_accuracy`."""
    digest = hashlib.sha256(repr(sorted(encode(recipe).items())).encode()).hexdigest()[:12]
    return Fidelity(
        f"fine-tune, {recipe.epochs} epochs of {train_images or 'all'} training images, recipe "
        f"{digest}",
        lambda task, widths, seed: short_finetune_accuracy(
            task, widths, seed=seed, recipe=recipe, train_images=train_images
        ),
    )


class Evaluator:
    """Accuracies by (task, widths, seed, fidelity), each measured once and kept in a ledger.

    Attributes:
        measured, replayed: evaluations that were run, and that the ledger already had.
        replayed_seconds: what the latter took when they were run.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.measured = self.replayed = 0
        self.replayed_seconds = 0.0

    def __call__(self, task: Task, widths: Sequence[int], seed: int, fidelity: Fidelity) -> float:
        """The accuracy in [0, 1] of `task` pruned to `widths` with the channels of `seed`."""
        key = Key(
            network=task.network,
            split=task.split_digest,
            classes=len(task.val.classes),
            image_size=task.val.image_size,
            widths=tuple(int(width) for width in widths),
            criterion=CRITERION,
            seed=seed,
            fidelity=fidelity.name,
        )
        known = self.ledger.get(key)
        if known is not None:
            self.replayed += 1
            self.replayed_seconds += known.seconds
            return known.accuracy
        started = time.perf_counter()
        accuracy = fidelity.measure(task, key.widths, seed)
        self.ledger.add(Row(key, accuracy, round(time.perf_counter() - started, 3)))
        self.measured += 1
        return accuracy


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def say(text: str) -> None:
    """One line of progress, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
