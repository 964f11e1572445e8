"""The devices and processes of a training, through Accelerate, and its precision."""

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
    """Restore Accelerate's state afterwards, unless several processes are joined through it.

    Threads take turns, because the whole process shares that state and torch's random generators.
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
    """An Accelerator on CUDA if there is one, unless `cpu`; it compiles if the recipe says so.

    Processes that a launcher started are joined, on the CPU too.

    Args:
        trackers: names that Accelerate knows; their files go into `folder`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        cpu = True  # otherwise Accelerate would let each process train alone
    # Accelerate keeps one state per process and refuses another device after the first. Unless
    # processes are joined through it, it can be reset.
    processes = PartialState(cpu=cpu)
    if processes.num_processes > 1:  # gloo's threads abort a process that ends with them running
        atexit.register(processes.destroy_process_group)
    # CUDA graphs hold gradients in memory that the next pass overwrites: they cannot accumulate.
    graphs = processes.device.type == "cuda" and recipe.accumulate == 1
    AcceleratorState._reset_state(reset_partial_state=processes.num_processes == 1)
    compiler = TorchDynamoPlugin(
        backend="inductor" if recipe.compile else "no",
        mode="reduce-overhead" if graphs else "default",
    )
    return Accelerator(
        mixed_precision="no",  # the engine does it: Accelerate would change the network's forward
        cpu=cpu,
        dynamo_plugin=compiler,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        log_with=list(trackers) or None,
        project_dir=folder,
    )


def half_precision(recipe: Recipe, device: str) -> torch.dtype | None:
    """The autocast data type of the forward pass, or None for float32."""
    if recipe.precision == "fp16" and device == "cpu":
        raise ZooError("A CPU does not train in fp16: choose the precision bf16, fp32 or auto.")
    if recipe.precision == "auto":
        cuda = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if cuda else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
