"""Training on accelerate: `finetune` in place, and `evaluate`; the same code on CPU and CUDA."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from zoo.data import DeviceLoader, ImageSet, check_labels, load_data
from zoo.errors import DataError, DivergenceError, unknown
from zoo.pruning.surgery import evaluating

__all__ = ["RECIPES", "EpochRecord", "Evaluation", "Recipe", "TrainResult", "evaluate", "finetune"]

Data = Dataset | DataLoader | str


@dataclass(frozen=True)
class Recipe:
    """How to train: everything but the data and the seed."""

    epochs: int = 10
    """passes over the training data"""
    batch_size: int = 128
    """images per step and process"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (with Nesterov momentum) or adamw"""
    lr: float = 0.1
    """peak learning rate"""
    momentum: float = 0.9
    """of sgd"""
    weight_decay: float = 5e-4
    """on weights of two and more dimensions; biases and norms have none"""
    warmup: float = 0.2
    """share of all steps that the learning rate rises linearly; afterwards it falls as a cosine"""
    label_smoothing: float = 0.0
    """of the cross-entropy"""
    clip_norm: float | None = 5.0
    """largest gradient norm"""
    augment: bool = True
    """random crops and mirroring, for image sets that live on the device"""
    distill: float = 0.7
    """weight of the teacher's term when there is a teacher (Hinton et al., temperature 4)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where a CUDA device likes it, else fp32"""


RECIPES: dict[str, Recipe] = {
    "quick": Recipe(epochs=2, lr=0.05),
    "standard": Recipe(epochs=20),
    "long": Recipe(epochs=100),
}


@dataclass(frozen=True)
class EpochRecord:
    """One pass: mean training loss, validation accuracy in [0, 1] if measured, and seconds."""

    epoch: int
    loss: float
    accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What training did. Accuracies are validation accuracies in [0, 1], None if not measured.

    Attributes:
        initial: before the first step.
        accuracy: of the weights that were kept, the best seen.
        epoch: that they come from; 0 means before the first step.
        history: one record per finished epoch.
        interrupted: whether Ctrl-C ended it early.
        seconds: wall time in all.
        device: where it ran.
    """

    initial: float | None
    accuracy: float | None
    epoch: int
    history: tuple[EpochRecord, ...]
    interrupted: bool
    seconds: float
    device: str


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy in [0, 1] and mean cross-entropy over `images` images."""

    accuracy: float
    loss: float
    images: int


def finetune(
    model: nn.Module,
    train: Data,
    val: Data | None,
    *,
    teacher: nn.Module | None = None,
    recipe: str | Recipe = "standard",
    seed: int = 0,
    progress: bool | None = None,
    cpu: bool = False,
) -> TrainResult:
    """Train `model` in place and keep the weights of its best validation accuracy.

    Args:
        model: any classifier, images (N, 3, H, W) to logits (N, classes).
        train, val: torch Datasets or DataLoaders of (image, label), or the name of a data set, of
            which the training and validation splits are taken. Without `val` nothing is measured
            and the last weights are kept.
        teacher: a network with the same outputs to distil from; it is moved to the device, and its
            mode is restored.
        recipe: a name of `RECIPES` or a `Recipe`.
        seed: of shuffling, augmentation and dropout; the caller's random state is left alone.
        progress: show a bar; by default when standard error is a terminal.
        cpu: stay on the CPU even where CUDA is available.

    Returns:
        A `TrainResult`. The model stays on the device it was trained on, in eval mode. Ctrl-C ends
        training early with the best weights so far in place.

    Raises:
        DataError: when a label does not fit the network's outputs.
        DivergenceError: when the loss stops being finite; the best weights so far are in place.
    """
    started = time.perf_counter()
    settings = _recipe(recipe)
    accelerator = _accelerator(settings.precision, cpu)
    device = accelerator.device
    model.to(device)
    batches = _loader(train, "train", settings, accelerator, seed)
    held = None if val is None else _loader(val, "val", settings, accelerator, seed)
    if len(batches) == 0:
        raise DataError("The training data holds no images.")
    steps = settings.epochs * len(batches)
    optimizer = _optimizer(model, settings)
    warm = max(1, round(settings.warmup * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(warm, steps))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    teaching = nullcontext() if teacher is None else evaluating(teacher.to(device))
    initial = None if held is None else evaluate(model, held).accuracy
    best, best_epoch, best_state = initial, 0, _snapshot(model)
    history: list[EpochRecord] = []
    interrupted = False
    try:
        with teaching, _seeded(seed), _progress_bar(steps, progress) as advance:
            for epoch in range(1, settings.epochs + 1):
                tick = time.perf_counter()
                loss = _train_epoch(
                    wrapped, batches, optimizer, scheduler, accelerator, settings, teacher, advance,
                    check=epoch == 1,
                )  # fmt: skip
                if not math.isfinite(loss):
                    raise DivergenceError(
                        f"The training loss became {loss} in epoch {epoch}; the best weights so "
                        f"far (epoch {best_epoch}) were kept. Try a smaller learning rate than "
                        f"{settings.lr}."
                    )
                accuracy = None if held is None else evaluate(model, held).accuracy
                history.append(EpochRecord(epoch, loss, accuracy, time.perf_counter() - tick))
                told = "" if accuracy is None else f"  val {accuracy:.2%}"
                advance(0, f"loss {loss:.3f}{told}")
                if accuracy is None or best is None or accuracy >= best:
                    best, best_epoch, best_state = accuracy, epoch, _snapshot(model)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        model.load_state_dict(best_state)
        model.eval()
    seconds = time.perf_counter() - started
    return TrainResult(initial, best, best_epoch, tuple(history), interrupted, seconds, str(device))


def evaluate(model: nn.Module, data: Data | Iterable, *, batch_size: int = 500) -> Evaluation:
    """Top-1 accuracy and mean cross-entropy of `model`, where it is, on `data`.

    Every layer is in eval mode meanwhile and in its own mode afterwards.

    Args:
        model: any classifier, images (N, 3, H, W) to logits (N, classes).
        data: a torch Dataset or DataLoader of (image, label), or a data set's name (test split).
        batch_size: used when `data` is not already batched.

    Raises:
        DataError: when the data is empty or a label does not fit the network's outputs.
    """
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    if isinstance(data, str):
        data = load_data(*_name_and_root(data)).test
    batches: Any = data
    if isinstance(data, ImageSet):
        batches = DeviceLoader(data, batch_size, device=device)
    elif isinstance(data, Dataset):
        batches = DataLoader(data, batch_size)
    correct, loss, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
    with evaluating(model), torch.inference_mode():
        for images, labels in batches:
            images = images.to(device, memory_format=torch.channels_last)
            labels = labels.to(device)
            logits = model(images).float()
            check_labels(labels, logits)
            loss += functional.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
    if count == 0:
        raise DataError("There are no images to evaluate on.")
    return Evaluation(correct.item() / count, loss.item() / count, count)


def _train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: Any,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    accelerator: Accelerator,
    recipe: Recipe,
    teacher: nn.Module | None,
    advance: Callable[..., None],
    *,
    check: bool,
) -> float:
    """One pass over `batches`; the mean loss, which is not finite as soon as one step's is not.

    To `check` the labels waits for the device at every step, so only the first pass does.
    """
    model.train()
    total, count = torch.zeros((), device=accelerator.device), 0
    for images, labels in batches:
        images = images.to(accelerator.device, memory_format=torch.channels_last)
        labels = labels.to(accelerator.device)
        logits = model(images)
        if check:
            check_labels(labels, logits)
        loss = functional.cross_entropy(
            logits.float(), labels, label_smoothing=recipe.label_smoothing
        )
        if teacher is not None:
            with torch.no_grad():
                target = teacher(images).float()
            loss = (1 - recipe.distill) * loss + recipe.distill * _distillation(logits, target)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        if recipe.clip_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        scheduler.step()
        total += loss.detach()
        count += 1
        advance(1)
        if count % 50 == 0 and not math.isfinite(total.item()):
            break
    return total.item() / max(count, 1)


def _distillation(logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    student = functional.log_softmax(logits.float() / temperature, dim=1)
    wanted = functional.log_softmax(target / temperature, dim=1)
    divergence = functional.kl_div(student, wanted, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _recipe(recipe: str | Recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return RECIPES[recipe]


def _accelerator(precision: str, cpu: bool) -> Accelerator:
    cuda = torch.cuda.is_available() and not cpu
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    mixed: Any = "no" if precision == "fp32" else precision
    # Accelerate keeps one state per process and refuses another precision or device after the
    # first; unless processes are joined through it, it can simply be forgotten.
    AcceleratorState._reset_state(reset_partial_state=PartialState(cpu=cpu).num_processes == 1)
    return Accelerator(mixed_precision=mixed, cpu=cpu)


def _loader(data: Data, split: str, recipe: Recipe, accelerator: Accelerator, seed: int) -> Any:
    """Batches of `data` on the accelerator's device, shared out between its processes."""
    training = split == "train"
    if isinstance(data, str):
        splits = load_data(*_name_and_root(data))
        data = splits.train if training else splits.val
    if isinstance(data, ImageSet):
        return DeviceLoader(
            data,
            recipe.batch_size if training else 500,
            device=accelerator.device,
            augment=training and recipe.augment,
            shuffle=training,
            drop_last=training and len(data) >= recipe.batch_size * accelerator.num_processes,
            seed=seed,
            rank=accelerator.process_index if training else 0,
            world_size=accelerator.num_processes if training else 1,
        )
    if isinstance(data, Dataset):
        generator = torch.Generator().manual_seed(seed)
        workers = 2 if accelerator.device.type == "cuda" else 0
        size = recipe.batch_size if training else 500
        data = DataLoader(
            data, size, shuffle=training, num_workers=workers, generator=generator,
            drop_last=training and len(data) >= size,  # type: ignore[arg-type]
        )  # fmt: skip
    return accelerator.prepare(data) if training else data


def _name_and_root(data: str) -> tuple[str, Path | None]:
    """`cifar10@FOLDER` as ("cifar10", FOLDER); a plain name has no folder."""
    name, _, folder = data.partition("@")
    return name, Path(folder) if folder else None


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


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's global generators start from `seed` inside and are as before afterwards."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _progress_bar(steps: int, show: bool | None) -> Iterator[Callable[..., None]]:
    """A function (steps done, text) that moves the bar, or does nothing when it is not shown."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda *_: None
        return
    from tqdm import tqdm

    with tqdm(total=steps, unit="step", leave=False, file=sys.stderr) as bar:

        def advance(done: int, text: str = "") -> None:
            bar.update(done)
            if text:
                bar.set_postfix_str(text)

        yield advance
