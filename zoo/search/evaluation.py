"""The accuracy of candidates at several fidelities, many at a time, each paid for once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Protocol

import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.batches import DeviceLoader
from zoo.data import ImageSet
from zoo.documents import encode
from zoo.errors import DivergenceError, ZooError
from zoo.pruning.masking import masked
from zoo.recipes import Recipe
from zoo.search.ledger import Key, Ledger, Row
from zoo.search.tasks import (
    CRITERION,
    Candidate,
    cut,
    device,
    layer_features,
    plan_of,
    sample,
)
from zoo.search.workers import InProcess, Pool
from zoo.strides import UnitStrides
from zoo.training import evaluate, finetune

__all__ = [
    "Evaluate",
    "Evaluator",
    "Fidelity",
    "FineTuning",
    "Recalibration",
    "live_features",
    "recalibrate",
    "recalibrated",
]

TRAINING = 2
"""Of the code that trains: what an earlier one measured does not answer for this one.

1: gradients of narrow shortcuts could be wrong (see `UnitStrides`). 2: they are right.
"""

SGD_STEPS = 50
"""Most steps that recalibrate a network without batch norm."""

Evaluate = Callable[[Sequence[Candidate]], Sequence[float]]
"""Candidates -> their validation accuracies in [0, 1], in the same order."""


class Fidelity(Protocol):
    """How accuracies are measured; `name` holds every setting that they depend on."""

    @property
    def name(self) -> str: ...

    def measure(self, candidate: Candidate) -> float:
        """The validation accuracy in [0, 1] of one candidate."""


@dataclass(frozen=True)
class Recalibration:
    """Surgery and `recalibrate`, with no real training: the cheapest fidelity.

    Attributes:
        calibration_images: training images for the recalibration.
        val_images: validation images to measure on; all by default.
    """

    calibration_images: int = 2048
    val_images: int | None = None

    @property
    def name(self) -> str:
        return (
            f"recalibration, {self.calibration_images} training images, "
            f"{self.val_images or 'all'} validation images"
        )

    def measure(self, candidate: Candidate) -> float:
        module = recalibrated(candidate, self.calibration_images)
        return evaluate(module, sample(candidate.task.val, self.val_images)).accuracy


@dataclass(frozen=True)
class FineTuning:
    """Surgery and a fine-tune, of which the last weights are measured; 0 if it diverges.

    Attributes:
        recipe: how to train.
        train_images: training images to use; all by default.
    """

    recipe: Recipe
    train_images: int | None = None

    @classmethod
    def of(cls, epochs: int, train_images: int | None, lr: float) -> FineTuning:
        """The plain recipe in fp32, that rankings and evidence are measured by."""
        return cls(Recipe(epochs=epochs, lr=lr, precision="fp32"), train_images)

    @property
    def name(self) -> str:
        settings = (TRAINING, sorted(encode(self.recipe).items()))
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
        return (
            f"fine-tune, {self.recipe.epochs} epochs of {self.train_images or 'all'} training "
            f"images, recipe {digest}, last weights"
        )

    def measure(self, candidate: Candidate) -> float:
        module, task = cut(candidate), candidate.task
        train = sample(task.train, self.train_images)
        try:
            result = finetune(
                module,
                train,
                None,
                teacher=None,
                recipe=self.recipe,
                seed=candidate.seed,
                progress=False,
            )
        except DivergenceError:
            return 0.0
        if result.interrupted:
            raise KeyboardInterrupt
        return evaluate(module, task.val).accuracy


class Evaluator:
    """Accuracies of candidates at a fidelity, each measured once and kept in a ledger.

    Args:
        ledger: what is known already, and where new rows go as they come.
        pool: what measures; this process by default.

    Attributes:
        measured: how many evaluations were run.
        replayed: those that the ledger had from an earlier run.
    """

    def __init__(self, ledger: Ledger, pool: Pool | None = None) -> None:
        self.ledger, self.pool = ledger, pool or InProcess()
        self.measured = 0
        self.replayed: dict[Key, Row] = {}
        self._earlier = {row.key for row in ledger}

    @property
    def spent(self) -> tuple[int, float]:
        """Evaluations asked for, replayed ones among them, and the seconds that these took."""
        seconds = sum(row.seconds for row in self.replayed.values())
        return self.measured + len(self.replayed), seconds

    def __call__(
        self,
        candidates: Sequence[Candidate],
        fidelity: Fidelity,
        source: str | Sequence[str] | None = None,
    ) -> list[float]:
        """The accuracies in [0, 1] of `candidates`, in order.

        Args:
            candidates: what to measure; equal ones are measured once.
            fidelity: how.
            source: who asks (`ppo`, `equal`, ...), of all or of each, for the ledger's summary.

        Raises:
            ZooError: for an accuracy that is not a number in [0, 1]; it is not kept.
        """
        keys = [_key(candidate, fidelity) for candidate in candidates]
        if source is None or isinstance(source, str):
            source = [source or ""] * len(keys)
        missing: dict[Key, tuple[Candidate, str]] = {}
        for key, candidate, asking in zip(keys, candidates, source, strict=True):
            known = self.ledger.get(key)
            if known is None:
                missing.setdefault(key, (candidate, asking))
            elif key in self._earlier:
                self.replayed[key] = known
        for key, accuracy, seconds in self._measured(missing, fidelity):
            self.ledger.add(Row(key, accuracy, round(seconds, 3), missing[key][1] or None))
            self.measured += 1
        rows = [self.ledger.get(key) for key in keys]
        return [row.accuracy for row in rows if row is not None]

    def _measured(
        self, missing: dict[Key, tuple[Candidate, str]], fidelity: Fidelity
    ) -> Iterator[tuple[Key, float, float]]:
        keys, candidates = list(missing), [candidate for candidate, _ in missing.values()]
        for index, accuracy, seconds in self.pool.run(candidates, fidelity):
            if not math.isfinite(accuracy) or not 0 <= accuracy <= 1:
                raise ZooError(
                    f"{candidates[index].task.name} pruned to {list(keys[index].widths)} was given "
                    f"an accuracy of {accuracy} by {fidelity.name}; it must be in [0, 1]."
                )
            yield keys[index], accuracy, seconds


def _key(candidate: Candidate, fidelity: Fidelity) -> Key:
    task = candidate.task
    return Key(
        network=task.network,
        split=task.data_digest,
        classes=len(task.val.classes),
        image_size=task.val.images.shape[-1],
        widths=tuple(int(width) for width in candidate.widths),
        criterion=CRITERION,
        seed=candidate.seed,
        fidelity=fidelity.name,
    )


def live_features(
    candidate: Candidate, calibration_images: int = 512, feature_images: int = 512
) -> tuple[NDArray, ...]:
    """The Taylor features of a candidate as it is now: masked, its batch norms recalibrated.

    Returns:
        One float64 vector per channel group, as long as the dense group; pruned channels have 0.
    """
    task = candidate.task
    module = masked(task.module, task.groups, plan_of(candidate))
    _reset_statistics(module, sample(task.train, calibration_images))
    return layer_features(module, task.groups, sample(task.val, feature_images))


def recalibrated(candidate: Candidate, calibration_images: int) -> nn.Module:
    """The candidate's network after surgery and `recalibrate`."""
    task = candidate.task
    module = cut(candidate).to(device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    recalibrate(module, task.module, sample(task.train, calibration_images))
    return module


def recalibrate(module: nn.Module, dense: nn.Module, train: ImageSet) -> None:
    """Repair, in place and without real training, what pruning did to a network's activations.

    Batch-norm statistics are recomputed over `train`. A network without batch norm has the inputs
    of each layer rescaled by dense / kept inputs and takes at most `SGD_STEPS` small SGD steps.

    Args:
        module: the pruned network.
        dense: the network that it was cut from, with the same parameter names.
        train: the calibration images; they are not augmented.
    """
    if _reset_statistics(module, train):
        return
    shapes = {name: parameter.shape for name, parameter in dense.named_parameters()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(shapes[name][1] / parameter.shape[1])
    _small_steps(module, train)


def _reset_statistics(module: nn.Module, train: ImageSet) -> bool:
    """Recompute the statistics of batch norms over `train`; false where there are none."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if not norms:
        return False
    module.eval()
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    batch = len(train) // max(1, round(len(train) / 512))
    with torch.no_grad():
        for images, _ in DeviceLoader(train, batch, device=device(), drop_last=True):
            module(images.to(memory_format=torch.channels_last))
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    module.eval()
    return True


def _small_steps(module: nn.Module, train: ImageSet) -> None:
    """Up to `SGD_STEPS` steps of SGD, with a learning rate that falls linearly to zero."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / SGD_STEPS)
    batches = DeviceLoader(train, min(128, len(train)), device=device(), drop_last=True)
    module.train()
    passes = chain.from_iterable(repeat(batches))
    for images, labels in islice(passes, SGD_STEPS):
        with UnitStrides():
            logits = module(images.to(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        fall.step()
    module.eval()
