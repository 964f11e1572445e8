"""The moving parts of a training: forward and backward passes, steps, averages, and their state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from zoo.batches import DeviceLoader, check_labels
from zoo.errors import DataError
from zoo.pruning.surgery import evaluating
from zoo.recipes import Recipe

__all__ = ["Engine", "make_accelerator"]

LOOK_EVERY = 50
"""Steps between looks at the loss, each of which waits for the device."""


class Engine:
    """Trains `model` in place, epoch by epoch; `state` after one is all that the next depends on.

    Args:
        model: on the accelerator's device; channels-last from here on.
        batches: of (images, labels), with a length.
        recipe: how to train.
        accelerator: what to train on.
        teacher: on the device and in eval mode, or None.

    Attributes:
        kept: the network whose weights are worth keeping: the average, if the recipe wants one.
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
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = _optimizer(model, recipe)
        steps = recipe.epochs * math.ceil(len(batches) / recipe.accumulate)
        warm = max(1, round(recipe.warmup * steps))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(warm, steps))
        self._average = ModelEmaV3(model, recipe.ema, use_warmup=True) if recipe.ema else None
        self._forward, self._optimizer = accelerator.prepare(model, optimizer)
        self._logits: Tensor | None = None
        self.kept: nn.Module = self._average.module if self._average else model

    def train(self, advance: Callable[..., None], *, check: bool) -> float:
        """One pass; the mean loss, which is not finite soon after one step's is not.

        To `check` the labels waits for the device at every step.
        """
        self._forward.train()
        self._optimizer.zero_grad(set_to_none=True)
        total, count, size = torch.zeros((), device=self.accelerator.device), 0, len(self.batches)
        for images, labels in self.batches:
            first = count - count % self.recipe.accumulate
            share = min(self.recipe.accumulate, size - first)
            count += 1
            last = count == first + share
            with nullcontext() if last else self.accelerator.no_sync(self._forward):
                loss = self._loss(images, labels, check)
                self.accelerator.backward(loss / share)
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

    def _loss(self, images: Tensor, labels: Tensor, check: bool) -> Tensor:
        device = self.accelerator.device
        images = images.to(device, memory_format=torch.channels_last)
        labels = labels.to(device)
        if check:
            check_labels(labels, self._outputs(images))
        if self.recipe.mixup or self.recipe.cutmix:
            images, labels = self._mixed(images, labels)
        logits = self._forward(images)
        loss = functional.cross_entropy(
            logits.float(), labels, label_smoothing=self.recipe.label_smoothing
        )
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(images).float()
            if target.shape != logits.shape:
                raise DataError(
                    f"The teacher has {target.shape[1]} outputs, the network {logits.shape[1]}."
                )
            share = self.recipe.distill
            loss = (1 - share) * loss + share * _distillation(logits, target)
        return loss

    def _outputs(self, images: Tensor) -> Tensor:
        """The network's logits of one image, asked for once; they tell how many there are."""
        if self._logits is None:
            with evaluating(self.model), torch.no_grad():
                self._logits = self.model(images[:1])
        return self._logits

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images mixed with one another, and their labels as probabilities (N, classes)."""
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, self.recipe.mixup), (v2.CutMix, self.recipe.cutmix))
        classes = self._outputs(images).shape[1]
        wanted = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
        return v2.RandomChoice(wanted)(images, labels)

    def _step(self) -> None:
        if self.recipe.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self._forward.parameters(), self.recipe.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        if self._average is not None:
            self._average.update(self.model, step=self._schedule.last_epoch)

    def _share_statistics(self) -> None:
        """Statistics that every process gathered of its own images become their mean."""
        if self.accelerator.num_processes > 1:
            for network in dict.fromkeys((self.model, self.kept)):
                for buffer in network.buffers():
                    if buffer.is_floating_point():
                        buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    def _mean(self, value: Tensor) -> float:
        """`value`, averaged over the processes."""
        return self.accelerator.reduce(value, "mean").item()

    def close(self) -> None:
        """Leave `model` as it was, but for its weights, its layout and its device."""
        self.accelerator.unwrap_model(
            self._forward, keep_fp32_wrapper=False, keep_torch_compile=False
        )

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, from which `restore` goes on bit by bit on the same device."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        return parts | {"random": random, "order": self._order()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, inside the caller's fork of the random generators."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"][0])
        if len(state["random"]) == 1 + torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random"][1:])
        if isinstance(self.batches, DeviceLoader):
            self.batches.epoch = state["order"]
        elif state["order"] is not None:
            self.batches.generator.set_state(state["order"])

    def _order(self) -> Any:
        """What the order of the next pass depends on, beside the global random state."""
        if isinstance(self.batches, DeviceLoader):
            return self.batches.epoch
        generator = getattr(self.batches, "generator", None)
        return None if generator is None else generator.get_state()

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self._optimizer, "schedule": self._schedule}
        optional = {"average": self._average, "scaler": self.accelerator.scaler}
        return parts | {name: part for name, part in optional.items() if part is not None}


def make_accelerator(
    recipe: Recipe, cpu: bool, trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """An accelerator of the recipe's precision, on CUDA where there is one unless `cpu`.

    Args:
        trackers: names that Accelerate knows; what they write goes into `folder`.
    """
    cuda = torch.cuda.is_available() and not cpu
    precision: str = recipe.precision
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    mixed: Any = "no" if precision == "fp32" else precision
    # Accelerate keeps one state per process and refuses another precision or device after the
    # first; unless processes are joined through it, it can simply be forgotten.
    AcceleratorState._reset_state(reset_partial_state=PartialState(cpu=cpu).num_processes == 1)
    compiler = "inductor" if recipe.compile else None
    return Accelerator(
        mixed_precision=mixed,
        cpu=cpu,
        dynamo_backend=compiler,
        log_with=list(trackers) or None,
        project_dir=folder,
    )


def _distillation(logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    student = functional.log_softmax(logits.float() / temperature, dim=1)
    wanted = functional.log_softmax(target / temperature, dim=1)
    divergence = functional.kl_div(student, wanted, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True)


def _warmup_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return factor
