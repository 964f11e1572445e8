"""How a training is followed while it runs: a progress bar, and experiment trackers by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from zoo.errors import ZooError, unknown
from zoo.training.recipes import Recipe

__all__ = ["check_trackers", "progress_bar", "tracking"]


def check_trackers(names: Sequence[str], folder: Path | None) -> None:
    """Refuse names that Accelerate does not know, and trackers that could not write anything.

    Raises:
        ZooError: also for one that is not installed, or that needs a `folder` where there is none.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    built_in = {str(kind) for kind in LoggerType}
    installed = {str(kind) for kind in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name in built_in - installed:
            raise ZooError(f"The tracker {name} is not installed: pip install {name}.")
        if folder is None and LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
            raise ZooError(f"The tracker {name} writes files: name a folder with checkpoint=.")


@contextmanager
def tracking(
    accelerator: Accelerator, recipe: Recipe
) -> Iterator[Callable[[int, dict[str, float | None]], None]]:
    """A function (epoch, values) that tells the accelerator's trackers, which end afterwards."""
    settings = {name: value for name, value in vars(recipe).items() if value is not None}
    accelerator.init_trackers("prunezoo", config=settings)

    def track(epoch: int, values: dict[str, float | None]) -> None:
        measured = {name: value for name, value in values.items() if value is not None}
        accelerator.log(measured, step=epoch)

    try:
        yield track
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


@contextmanager
def progress_bar(
    batches: Any, epochs: int, done: int, processes: int, show: bool
) -> Iterator[Callable[..., None]]:
    """A function (images done, loss, accuracy) that moves the bar, or does nothing without one.

    Args:
        batches: of one epoch and process.
        epochs, done: how many there will be, and are already.
        processes: that have as many images each.
    """
    if not show:
        yield lambda *_: None
        return
    from tqdm import tqdm

    size: Any = getattr(batches, "batch_size", None)
    size = size or getattr(getattr(batches, "batch_sampler", None), "batch_size", 1)
    images = len(batches) * size * processes
    told = {"loss": "", "accuracy": ""}
    with tqdm(
        total=epochs * images, initial=done * images, unit="img", leave=False, file=sys.stderr
    ) as bar:

        def tell(count: int, loss: float | None = None, accuracy: float | None = None) -> None:
            bar.update(count * processes)
            if loss is not None:
                told["loss"] = f"loss {loss:.3f}"
            if accuracy is not None:
                told["accuracy"] = f", val {accuracy:.2%}"
            bar.set_postfix_str("".join(told.values()), refresh=loss is not None)

        yield tell
