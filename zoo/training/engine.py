"""The moving parts of a training: forward and backward passes, steps, averages, and their state."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.common.seeding import random_state, set_random_state
from zoo.common.strides import UnitStrides
from zoo.data.batches import DeviceLoader, check_labels, check_logits, checked_batch
from zoo.data.images import AnyImages
from zoo.errors import DataError, ZooError, first_line
from zoo.surgery.surgery import evaluating
from zoo.training.accelerators import half_precision
from zoo.training.averaging import WeightAverage
from zoo.training.optimization import distillation, make_optimizer, warmup_cosine
from zoo.training.recipes import Recipe

__all__ = ["Engine", "first_logits", "runs_channels_last"]

LOOK_EVERY = 50
"""Batches between two reads of the loss; each read waits for the device."""


class Engine:
    """Trains `model` in place, epoch by epoch; an epoch depends on the `state` before it alone.

    Args:
        model: on the accelerator's device; it is converted to channels-last.
        batches: of (images, labels), with a length.
        recipe: how to train.
        accelerator: what to train on.
        teacher: on the device and in eval mode, or None.

    Attributes:
        kept: the network to measure and keep: the average if the recipe asks for one, or `model`.

    Raises:
        ZooError: for a precision that the device does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        recipe: Recipe,
        accelerator: Accelerator,
        teacher: nn.Module | None,
    ) -> None:
        self.model, self.batches, self.recipe = model, batches, recipe
        self.accelerator, self.teacher = accelerator, teacher
        kind = accelerator.device.type
        half = half_precision(recipe, kind)
        self._autocast = partial(torch.autocast, kind, half, enabled=half is not None)
        self._scaler = torch.amp.GradScaler(kind, enabled=half is torch.float16)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = make_optimizer(model, recipe)
        steps = recipe.epochs * math.ceil(len(batches) / recipe.accumulate)
        warm = max(1, round(recipe.warmup * steps))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, warmup_cosine(warm, steps)
        )
        self._frozen = [layer for layer in model.modules() if _is_frozen_norm(layer)]
        self._average = WeightAverage(model, recipe.ema) if recipe.ema else None
        self._forward = accelerator.prepare_model(model)
        # With this mark, Accelerate would not prepare the network for another training.
        vars(model).pop("_is_accelerate_prepared", None)
        self._layout = torch.channels_last
        self._logits: Any = None
        self.kept: nn.Module = self._average.module if self._average else model

    def train(self, advance: Callable[..., None]) -> float:
        """Train for one epoch and return the mean loss; stop early once it is not finite.

        Args:
            advance: called with (images) per batch, and with (0, mean loss) every `LOOK_EVERY`.

        Raises:
            DataError: for labels that do not fit the network's outputs.
        """
        self._forward.train()
        self._optimizer.zero_grad(set_to_none=True)
        total, count, size = torch.zeros((), device=self.accelerator.device), 0, len(self.batches)
        for layer in self._frozen:
            layer.eval()
        for batch in self.batches:
            first = count - count % self.recipe.accumulate
            share = min(self.recipe.accumulate, size - first)
            count += 1
            last = count == first + share
            with nullcontext() if last else self.accelerator.no_sync(self._forward):
                images, labels = self._checked(batch)
                loss = self._loss(images, labels)
                self._scaler.scale(loss if share == 1 else loss / share).backward()
            if last:
                self._step()
            total += loss.detach()
            advance(len(labels))
            if count % LOOK_EVERY == 0:
                mean = self._mean(total) / count
                advance(0, mean)
                if not math.isfinite(mean):
                    return mean
        self._share_statistics()
        return self._mean(total) / max(count, 1)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor]:
        """One batch on the device, its labels checked; an image set's are all checked at once."""
        images, labels = checked_batch(batch)
        images = images.to(self.accelerator.device, non_blocking=True, memory_format=self._layout)
        own = isinstance(self.batches, DeviceLoader)
        if self._logits is None:
            images = self._in_common_layout(images)
            with evaluating(self.model), torch.no_grad():
                self._logits = first_logits(self.model, images[:1])
            if own:
                check_labels(self.batches.labels, self._logits)
                check_classes(self.batches.data, self._logits)
            self._check_teacher(images[:1])
        if not own:
            check_labels(labels, self._logits)
        return images, labels.to(self.accelerator.device, torch.long, non_blocking=True)

    def _check_teacher(self, images: Tensor) -> None:
        """Refuse a teacher that gives no logits of the network's classes for the first images."""
        if self.teacher is None:
            return
        check_logits(self._logits)
        with torch.no_grad(), self._autocast():
            target = first_logits(self.teacher, images, "teacher")
        check_logits(target, "teacher")
        if target.shape != self._logits.shape:
            raise DataError(
                f"The teacher has {target.shape[1]} outputs, the network {self._logits.shape[1]}."
            )

    def _in_common_layout(self, images: Tensor) -> Tensor:
        """The first images, in a memory format that all networks run in; converts these too."""
        fits = runs_channels_last(self.model, images[:1])
        if self.teacher is not None:
            with self._autocast():
                fits = fits and runs_channels_last(self.teacher, images[:1])
        if fits:
            return images
        self._layout = torch.contiguous_format
        for network in (self.model, self.kept, self.teacher):
            if network is not None:
                network.to(memory_format=self._layout)  # type: ignore[call-overload]
        return images.contiguous()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = self._mixed(images, labels)
        try:
            with self._autocast(), UnitStrides():
                logits = self._forward(images)
        except ValueError as error:
            if len(images) == 1 and "more than 1 value per channel" in str(error):
                raise DataError(
                    "A batch of one image is too small for batch norm: give the DataLoader "
                    "drop_last=True, or choose another batch size."
                ) from error
            raise
        check_logits(logits, "network in training mode")  # where some give auxiliary ones too
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        if self.teacher is not None:
            with torch.no_grad(), self._autocast():
                target = self.teacher(images).float()
            share = self.recipe.distill
            loss = (1 - share) * loss + share * distillation(logits, target)
        return loss

    @cached_property
    def _mixed(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """MixUp or CutMix, which makes labels probabilities (N, classes); else the identity."""
        if not (self.recipe.mixup or self.recipe.cutmix):
            return lambda images, labels: (images, labels)
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, self.recipe.mixup), (v2.CutMix, self.recipe.cutmix))
        classes = self._logits.shape[1]
        wanted = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
        mixed: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = v2.RandomChoice(wanted)
        return mixed

    def _step(self) -> None:
        if self.recipe.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        if self._average is not None:
            self._average.update(self.model, step=self._schedule.last_epoch)

    def _share_statistics(self) -> None:
        """Average the batch statistics over the processes, each of which saw its own images."""
        if self.accelerator.num_processes > 1:
            for network in dict.fromkeys((self.model, self.kept)):
                for buffer in network.buffers():
                    if buffer.is_floating_point():
                        buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    def _mean(self, value: Tensor) -> float:
        """`value`, averaged over the processes."""
        return float(self.accelerator.reduce(value, "mean"))

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which `restore` continues, on one device bit for bit."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return parts | {"random": random_state(), "order": self._order()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; inside `seeded`, because this sets the global generators."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        set_random_state(state["random"])
        if isinstance(self.batches, DeviceLoader):
            self.batches.epoch = state["order"]
            return
        passes, generators = state["order"]
        if len(generators) != len(_generators(self.batches)):
            raise ZooError(
                "The savepoint is of a training on another kind of data, or another DataLoader: "
                "resume with the original one."
            )
        if hasattr(self.batches, "iteration"):
            self.batches.iteration = passes
        for generator, own in zip(_generators(self.batches), generators, strict=True):
            generator.set_state(own)

    def _order(self) -> Any:
        """What the order of the next pass depends on, beside the global random state."""
        if isinstance(self.batches, DeviceLoader):
            return self.batches.epoch
        states = [generator.get_state() for generator in _generators(self.batches)]
        return getattr(self.batches, "iteration", 0), states

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model, "optimizer": self._optimizer, "schedule": self._schedule,
            "scaler": self._scaler,
        }  # fmt: skip
        return parts | ({"average": self._average} if self._average else {})


def runs_channels_last(network: nn.Module, images: Tensor) -> bool:
    """Whether a network runs on channels-last images; `x.view(len(x), -1)` does not.

    Most networks are faster in this format. Other errors are ignored: `first_logits` reports them.
    """
    try:
        with evaluating(network), torch.no_grad():
            network(images.contiguous(memory_format=torch.channels_last))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return "view size is not compatible" not in str(error)
    return True


def first_logits(model: nn.Module, images: Tensor, who: str = "network") -> Any:
    """The output of a network, `who`, for the first images.

    Raises:
        DataError: if it does not run on them.
    """
    try:
        return model(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise DataError(
            f"The {who} does not run on images of shape {tuple(images.shape)}: {first_line(error)}"
        ) from error


def _is_frozen_norm(layer: nn.Module) -> bool:
    """Whether `layer` is a batch norm with frozen parameters, whose statistics are kept too."""
    own = list(layer.parameters(recurse=False))
    return isinstance(layer, _BatchNorm) and bool(own) and not any(p.requires_grad for p in own)


def check_classes(data: AnyImages, logits: Tensor) -> None:
    """Refuse images of more or fewer classes than the network has outputs."""
    if len(data.classes) != logits.shape[1]:
        raise DataError(
            f"{data.name} has {len(data.classes)} classes, the network {logits.shape[1]} outputs."
        )


def _generators(batches: Any) -> list[torch.Generator]:
    """The generators that a DataLoader shuffles with, beside the global ones."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", None)
    holders = (batches, getattr(batches, "sampler", None), batch_sampler, sampler)
    found = (getattr(holder, "generator", None) for holder in holders)
    return list(dict.fromkeys(generator for generator in found if generator is not None))
