"""Report on a running training: a progress bar, and experiment trackers by name."""

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
    """Refuse trackers that could not log anything.

    Raises:
        ZooError: for a name that Accelerate does not know, a tracker that is not installed, or one
            that needs a `folder` when that is None.
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
    """Yield a function (epoch, values) that logs to the trackers; finish these afterwards."""
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
    """Yield a function (images done, loss, accuracy) that moves the bar, if there is to be one.

    Args:
        batches: of one epoch in one process.
        epochs, done: epochs in all, and those that are finished.
        processes: how many; all have equally many images.
        show: False for no bar.
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
