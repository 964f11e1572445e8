"""Training on accelerate: `finetune` in place, and `evaluate`; the same code on CPU and CUDA."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn import functional

from zoo.common.seeding import seeded
from zoo.common.strides import laid_out
from zoo.data.batches import check_labels, checked_batch
from zoo.data.datasets import AnyImages
from zoo.errors import DataError, DivergenceError, ZooError, integer
from zoo.surgery.surgery import evaluating
from zoo.training.accelerators import make_accelerator, separate_state
from zoo.training.engine import Engine, check_classes, first_logits, runs_channels_last
from zoo.training.loaders import Data, found, measured_batches, training_batches
from zoo.training.recipes import Recipe, read_recipe
from zoo.training.reporting import check_trackers, progress_bar, tracking
from zoo.training.savepoints import check_folder, identify, read_savepoint, write_savepoint
from zoo.training.teachers import Teacher, find_teacher, teaching

__all__ = ["EpochRecord", "Evaluation", "TrainResult", "evaluate", "finetune"]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: mean training loss, validation accuracy in [0, 1] if measured, and seconds."""

    epoch: int
    loss: float
    accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What training did. Accuracies are validation accuracies in [0, 1], None if not measured.

    Attributes:
        initial: accuracy before the first step.
        accuracy: the best accuracy, that of the weights that were kept.
        epoch: the epoch of these weights; 0 means before the first step.
        history: one record per finished epoch.
        interrupted: whether Ctrl-C ended it early.
        seconds: wall time, of this call alone.
        device: where it ran.
        teacher: the reference of the source, or the class of another network; None without one.
    """

    initial: float | None
    accuracy: float | None
    epoch: int
    history: tuple[EpochRecord, ...]
    interrupted: bool
    seconds: float
    device: str
    teacher: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy in [0, 1] and mean cross-entropy over `images` images."""

    accuracy: float
    loss: float
    images: int


@dataclass
class _Standing:
    """The progress of a training: its best weights so far, their epoch, and the history."""

    initial: float | None
    accuracy: float | None
    weights: dict[str, Tensor]
    epoch: int = 0
    history: list[EpochRecord] = field(default_factory=list)

    def note(self, record: EpochRecord, network: nn.Module) -> None:
        """Add an epoch, and keep the weights of `network` unless earlier ones were better."""
        change: dict[str, Any] = {"history": [*self.history, record]}
        if record.accuracy is None or self.accuracy is None or record.accuracy >= self.accuracy:
            change |= {"accuracy": record.accuracy, "epoch": record.epoch}
            change["weights"] = _snapshot(network)
        vars(self).update(change)  # all at once: Ctrl-C comes before or after

    def state(self) -> dict[str, Any]:
        return {**vars(self), "history": [vars(record) for record in self.history]}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> _Standing:
        history = [EpochRecord(**record) for record in state["history"]]
        return cls(**{**state, "history": history})


@separate_state()
@torch.inference_mode(mode=False)
@torch.enable_grad()
def finetune(
    model: nn.Module,
    train: Data,
    val: Data | None,
    *,
    teacher: Teacher = "auto",
    recipe: str | Path | Recipe = "standard",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    trackers: Sequence[str] = (),
    progress: bool | None = None,
    cpu: bool = False,
) -> TrainResult:
    """Train `model` in place and keep the weights of its best validation accuracy.

    Args:
        model: any classifier, images (N, 3, H, W) to logits (N, classes), in training mode too.
        train, val: torch Datasets or DataLoaders of (image, label), or the name of a data set
            (`cifar10@FOLDER`, `imagefolder:PATH`) whose training and validation splits are used.
            Without `val` nothing is measured and the last weights are kept.
        teacher: what to distil from. A network must have the same outputs; it is moved to the
            device, and its mode and layout are restored. `source` is the dense network that `model`
            was pruned from, read by its recorded reference and sha256. `auto` is the source if it
            can be read, else none, with a warning if a file is recorded. None is none.
        recipe: a name of `RECIPES`, the path of a TOML file, or a `Recipe`.
        seed: of shuffling, augmentation and dropout; the caller's random state is left alone.
        checkpoint: folder to write the whole state of the training to after every epoch, with its
            history.jsonl. The state of a finished training stays until you remove it.
        resume: continue from `checkpoint`, or begin if it holds nothing yet. On a CPU the result is
            bit for bit that of an uninterrupted training, unless persistent workers of a
            DataLoader, which have their own random state, transform images at random.
        trackers: names of Accelerate's experiment trackers (`tensorboard`, `wandb`, ...) that log
            loss, accuracy and learning rate after every epoch; their files go into `checkpoint`.
        progress: show a bar; by default when standard error is a terminal.
        cpu: stay on the CPU even where CUDA is available.

    The caller's `torch.no_grad()` and `torch.inference_mode()` do not matter.

    Under `torchrun` or `accelerate launch` the processes share the training data, and a step takes
    the mean gradient of their batches; each of them measures and keeps the same weights.

    Returns:
        A `TrainResult`. The model stays on the device it was trained on, in eval mode. Ctrl-C ends
        training early with the best weights so far in place.

    Raises:
        DataError: when data has no length, is not of float images and integer labels, or when a
            label or the teacher does not fit the network's outputs.
        CheckpointError: when `teacher` is `source`, and no file is recorded or it has changed.
        DivergenceError: when the training or validation loss, or without `val` a weight, is not
            finite; the best weights so far are in place.
        ZooError: when `checkpoint` cannot be written, with the best weights so far in place; when
            it holds another training; for a precision that the device does not have; or for a
            network that was made in `torch.inference_mode()`.
    """
    started = time.perf_counter()
    settings, seed = read_recipe(recipe), integer("seed", seed) % 2**32
    trackers = [trackers] if isinstance(trackers, str) else trackers
    if resume and checkpoint is None:
        raise ZooError("resume=True needs checkpoint=, the folder to continue from.")
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ZooError(
            "The network was made in torch.inference_mode(), whose tensors cannot be trained: make "
            "it outside, or train a copy.deepcopy of it that is made outside."
        )
    dense, taught_by = find_teacher(model, teacher)
    folder = None if checkpoint is None else Path(checkpoint).expanduser()
    check_trackers(trackers, folder)
    accelerator = make_accelerator(settings, cpu, trackers, folder)
    device = accelerator.device
    model.to(device)
    with seeded(seed):  # reading the data draws from the global generators
        batches = training_batches(found(train, "train", model), settings, accelerator, seed)
        held = None
        if val is not None:
            held = measured_batches(found(val, "val", model), device, seed=seed)
    processes = accelerator.num_processes
    identity, saved = {}, None
    if folder is not None:
        identity = identify(settings, seed, model, dense, batches, held, processes)
        if accelerator.is_main_process:  # only its machine may have the folder
            check_folder(folder)
            saved = read_savepoint(folder, identity, resume=resume)
        (saved,) = broadcast_object_list([saved])
    engine = Engine(model, batches, settings, accelerator, dense)
    interrupted = False
    if saved is None:
        with seeded(seed):  # a DataLoader of the caller's draws from the global generators too
            initial = _accuracy(model, held, "before training")
        standing = _Standing(initial, initial, _snapshot(model))
    else:
        standing = _Standing.restored(saved["standing"])
    try:
        show = sys.stderr.isatty() if progress is None else progress
        show = show and accelerator.is_main_process
        done = len(standing.history)
        bar = progress_bar(batches, settings.epochs, done, processes, show)
        taught = nullcontext() if dense is None else teaching(dense.to(device))
        with taught, seeded(seed), tracking(accelerator, settings) as track, bar as tell:
            if saved is not None:
                engine.restore(saved["engine"])
            for epoch in range(done + 1, settings.epochs + 1):
                record = _one_epoch(engine, held, epoch, standing.epoch, tell)
                values = {"loss": record.loss, "accuracy": record.accuracy, "lr": engine.lr}
                track(epoch, values)
                standing.note(record, engine.kept)
                if folder is not None and accelerator.is_main_process:
                    state = {"engine": engine.state(), "standing": standing.state()}
                    write_savepoint(folder, identity, state, standing.history)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        model.load_state_dict(standing.weights)
        model.eval()
    return TrainResult(
        initial=standing.initial,
        accuracy=standing.accuracy,
        epoch=standing.epoch,
        history=tuple(standing.history),
        interrupted=interrupted,
        seconds=time.perf_counter() - started,
        device=str(device),
        teacher=taught_by,
    )


def _one_epoch(
    engine: Engine, held: Any, epoch: int, best: int, tell: Callable[..., None]
) -> EpochRecord:
    """Train for one epoch, and measure what would be kept of it.

    Raises:
        DivergenceError: when the training or validation loss is not finite.
    """
    started = time.perf_counter()
    loss = engine.train(tell)
    if not math.isfinite(loss):
        raise DivergenceError(
            f"The training loss became {loss} in epoch {epoch}; the best weights so far (epoch "
            f"{best}) were kept. Try a smaller learning rate than {engine.recipe.lr}."
        )
    accuracy = _accuracy(engine.kept, held, f"after epoch {epoch}")
    (accuracy,) = broadcast_object_list([accuracy])  # all processes keep the same weights
    tell(0, loss, accuracy)
    return EpochRecord(epoch, loss, accuracy, time.perf_counter() - started)


def evaluate(
    model: nn.Module, data: Data | Iterable[Any], *, batch_size: int | None = None
) -> Evaluation:
    """Top-1 accuracy and mean cross-entropy of `model` on `data`, on the device of `model`.

    Every layer is in eval mode during the call and in its own mode afterwards.

    Args:
        model: any classifier, images (N, 3, H, W) to logits (N, classes).
        data: a torch Dataset or DataLoader of (image, label), or a data set's name, as for
            `finetune` (test split).
        batch_size: used if `data` is not batched yet; by default a size that fits most memories.

    Raises:
        DataError: when the data is empty, is not of float images and integer labels, or a label
            does not fit the network's outputs.
    """
    if not isinstance(model, nn.Module):
        raise ZooError(
            f"A network is measured, not {type(model).__name__}: zoo.load_pruned reads a folder."
        )
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    if isinstance(data, str):
        data = found(data, "test", model)
    batches = measured_batches(data, device, batch_size)
    layout = torch.channels_last
    correct, loss, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
    # not in inference_mode, whose tensors a network could keep and later fail to train on
    with evaluating(model), torch.no_grad(), ExitStack() as layouts:
        for batch in batches:
            images, labels = checked_batch(batch)
            images = images.to(device, non_blocking=True, memory_format=layout)
            if count == 0 and not runs_channels_last(model, images[:1]):
                layout = torch.contiguous_format
                layouts.enter_context(laid_out(model, layout))
                images = images.contiguous()
            labels = labels.to(device, torch.long, non_blocking=True)
            output = model(images) if count else first_logits(model, images)
            if count == 0 and isinstance(data, AnyImages):
                check_classes(data, output)
            check_labels(labels, output)
            logits = output.float()
            loss += functional.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
    if count == 0:
        raise DataError("There are no images to evaluate on.")
    return Evaluation(correct.item() / count, loss.item() / count, count)


def _accuracy(network: nn.Module, held: Any, when: str) -> float | None:
    """Accuracy on the validation data; None without, after a check of the weights.

    Raises:
        DivergenceError: if the loss or a weight is not finite.
    """
    if held is not None:
        measured = evaluate(network, held)
        if math.isfinite(measured.loss):
            return measured.accuracy
        raise DivergenceError(
            f"The validation loss is {measured.loss} {when}: the network's outputs are not finite. "
            "The best weights before that were kept."
        )
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise DivergenceError(
                f"{name} is not finite {when}. The best weights before that were kept."
            )
    return None


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
