"""How the accuracy of a candidate is measured: after a recalibration, or after a fine-tune."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from typing import Protocol, Self

import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.common.documents import encode
from zoo.common.seeding import seeded
from zoo.common.strides import UnitStrides
from zoo.data.batches import DeviceLoader
from zoo.data.datasets import ImageSet
from zoo.errors import DivergenceError
from zoo.search.tasks import (
    Candidate,
    Task,
    cut,
    device,
    layer_features,
    plan_of,
    sample,
)
from zoo.surgery.initialisation import reinitialise
from zoo.surgery.masking import masked
from zoo.training.finetuning import evaluate, finetune
from zoo.training.optimization import distillation, make_optimizer, warmup_cosine
from zoo.training.recipes import RECIPES, Recipe

__all__ = [
    "Distilled",
    "Fidelity",
    "FineTuning",
    "FromScratch",
    "Recalibration",
    "live_features",
    "recalibrate",
    "recalibrated",
]

TRAINING = 2
"""Version of the training code, in a fine-tune's name: results of earlier versions are not reused.

1: gradients of narrow shortcuts could be wrong (see `UnitStrides`). 2: they are right.
"""

SGD_STEPS = 50
"""Most steps that recalibrate a network without batch norm."""


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
    """Surgery and a fine-tune; its last weights are measured, or 0 if it diverges.

    Attributes:
        recipe: how to train.
        train_images: training images to use; all by default.
        taught: whether the dense network is the teacher; by default there is none.
    """

    recipe: Recipe
    train_images: int | None = None
    taught: bool = False

    @classmethod
    def of(cls, epochs: int, train_images: int | None, lr: float) -> Self:
        """A fine-tune by the plain recipe in fp32, which rankings and evidence use."""
        return cls(Recipe(epochs=epochs, lr=lr, precision="fp32"), train_images)

    @classmethod
    def standard(cls, lr: float, epochs: int | None = None) -> Self:
        """What users do: the recipe `standard`, the dense network as teacher; in fp32."""
        own = RECIPES["standard"]
        return cls(replace(own, epochs=epochs or own.epochs, lr=lr, precision="fp32"), taught=True)

    @property
    def name(self) -> str:
        return f"fine-tune, {self._told}"

    @property
    def _told(self) -> str:
        settings = (TRAINING, sorted(encode(self.recipe).items()))
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
        taught = ", dense network as teacher" if self.taught else ""
        return (
            f"{self.recipe.epochs} epochs of {self.train_images or 'all'} training "
            f"images, recipe {digest}{taught}, last weights"
        )

    def start(self, candidate: Candidate) -> nn.Module:
        """The network that is trained."""
        return cut(candidate)

    def measure(self, candidate: Candidate) -> float:
        module, task = self.start(candidate), candidate.task
        train = sample(task.train, self.train_images)
        try:
            result = finetune(
                module,
                train,
                None,
                teacher=task.module if self.taught else None,
                recipe=self.recipe,
                seed=candidate.seed,
                progress=False,
            )
        except DivergenceError:
            return 0.0
        if result.interrupted:
            raise KeyboardInterrupt
        return evaluate(module, task.val).accuracy


@dataclass(frozen=True)
class FromScratch(FineTuning):
    """Training of a network of the candidate's widths from new random weights: the sibling.

    Convolutions start as those of `zoo.models` do (He et al., 2015), other layers by their own
    `reset_parameters`.
    """

    @property
    def name(self) -> str:
        return f"from scratch, {self._told}"

    def start(self, candidate: Candidate) -> nn.Module:
        module = cut(candidate)
        reinitialise(module, candidate.seed)
        with seeded(candidate.seed):
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        return module


@dataclass(frozen=True)
class Distilled:
    """A recalibration, then `steps` steps of distillation from the dense network.

    The loss is the recipe's mix of the teacher's term and the cross-entropy. All candidates see the
    same images in the same order, not augmented, so that the teacher computes its logits once. A
    network whose loss is not finite gets 0.

    Attributes:
        steps: of the optimiser.
        lr: peak learning rate.
        calibration_images: training images for the recalibration.
    """

    steps: int = 100
    lr: float = 0.05
    calibration_images: int = 1024

    @property
    def recipe(self) -> Recipe:
        return Recipe(epochs=1, lr=self.lr, precision="fp32", augment=False)

    @property
    def name(self) -> str:
        settings = (TRAINING, self.calibration_images, sorted(encode(self.recipe).items()))
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
        return f"distillation, {self.steps} steps, recipe {digest}, last weights"

    def measure(self, candidate: Candidate) -> float:
        module = recalibrated(candidate, self.calibration_images)
        with seeded(candidate.seed):  # for dropout
            learnt = self._learn(module, candidate.task)
        return evaluate(module, candidate.task.val).accuracy if learnt else 0.0

    def _learn(self, module: nn.Module, task: Task) -> bool:
        """Train `module` in place; false if its loss stops being finite."""
        recipe, size = self.recipe, min(self.recipe.batch_size, len(task.train))
        images = sample(task.train, self.steps * size)
        batches = DeviceLoader(images, size, device=device(), drop_last=True)
        wanted = task.dense_logits(self.steps * size).split(size)
        passes = chain.from_iterable(zip(batches, wanted, strict=False) for _ in repeat(None))
        optimizer = make_optimizer(module, recipe)
        warm = max(1, round(recipe.warmup * self.steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(warm, self.steps))
        module.train()
        for (pixels, labels), target in islice(passes, self.steps):
            with UnitStrides():
                logits = module(pixels.to(memory_format=torch.channels_last))
            hard = functional.cross_entropy(logits, labels)
            loss = torch.lerp(hard, distillation(logits, target), recipe.distill)
            if not torch.isfinite(loss):
                return False
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm or torch.inf)
            optimizer.step()
            schedule.step()
        module.eval()
        return True


def live_features(
    candidate: Candidate, calibration_images: int = 512, feature_images: int = 512
) -> tuple[NDArray, ...]:
    """The Taylor features of a candidate: masked, with recalibrated batch norms.

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
    """Repair the activations of a pruned network, in place and without real training.

    Batch-norm statistics are recomputed over `train`. Without batch norm, the weights of each layer
    are multiplied by dense / kept inputs, and at most `SGD_STEPS` small SGD steps follow.

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
    with seeded(0):  # for dropout
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
