"""What a training runs on: Accelerate's view of devices and processes, and the precision."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, TorchDynamoPlugin

from zoo.errors import ZooError
from zoo.training.recipes import Recipe

__all__ = ["half_precision", "make_accelerator", "separate_state"]


_ONE_TRAINING = threading.RLock()


@contextmanager
def separate_state() -> Iterator[None]:
    """Accelerate's state is as it was afterwards, unless processes are joined through it.

    Threads take turns: that state is the whole process's, and so are torch's random generators.
    """
    kinds = (PartialState, AcceleratorState)
    with _ONE_TRAINING:
        before = [dict(kind._shared_state) for kind in kinds]
        try:
            yield
        finally:
            if PartialState._shared_state.get("num_processes", 1) == 1:
                for kind, state in zip(kinds, before, strict=True):
                    kind._shared_state.clear()
                    kind._shared_state.update(state)


def make_accelerator(
    recipe: Recipe, cpu: bool, trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """An accelerator on CUDA where there is one unless `cpu`, which compiles if the recipe asks.

    Processes that a launcher started are joined on the CPU too.

    Args:
        trackers: names that Accelerate knows; what they write goes into `folder`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        cpu = True  # without this word Accelerate would let each of them train alone
    # Accelerate keeps one state per process and refuses another device after the first; unless
    # processes are joined through it, it can simply be forgotten.
    processes = PartialState(cpu=cpu)
    if processes.num_processes > 1:  # gloo's threads abort a process that ends with them running
        atexit.register(processes.destroy_process_group)
    # CUDA graphs keep gradients where the next pass writes, so that they cannot add up.
    graphs = processes.device.type == "cuda" and recipe.accumulate == 1
    AcceleratorState._reset_state(reset_partial_state=processes.num_processes == 1)
    compiler = TorchDynamoPlugin(
        backend="inductor" if recipe.compile else "no",
        mode="reduce-overhead" if graphs else "default",
    )
    return Accelerator(
        mixed_precision="no",  # the engine's affair: Accelerate would change the network's forward
        cpu=cpu,
        dynamo_plugin=compiler,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        log_with=list(trackers) or None,
        project_dir=folder,
    )


def half_precision(recipe: Recipe, device: str) -> torch.dtype | None:
    """What a forward pass computes in, None for single precision."""
    if recipe.precision == "fp16" and device == "cpu":
        raise ZooError("A CPU does not train in fp16: choose the precision bf16, fp32 or auto.")
    if recipe.precision == "auto":
        cuda = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if cuda else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
