"""Torch-Pruning's own pruner on one architecture: does it halve every layer's channels?

    python scripts/rival.py timm:resnet18

It runs in a process of its own, because it can hang: what it does not finish in time is stopped.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch_pruning
import tyro
from torch import nn

from zoo.models import architecture, build_model

__all__ = ["Outcome", "halve"]

CLASSES = 37
"""Of the classifier, which stays whole: no layer inside a network has this width."""
LARGEST = 0.6
"""Parameters left, as a fraction: half the channels everywhere leave a quarter to a half."""


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Attributes:
        verdict: `ok`, `not halved`, `timeout` or `failed: <reason>`.
        dense, pruned: parameters before and after; `pruned` is 0 where nothing came out.
        layers: convolutions and dense layers, the classifier apart; `whole` of them lost no output.
        seconds: of building the dependency graph and pruning, or until it was stopped.
    """

    verdict: str
    dense: int = 0
    pruned: int = 0
    layers: int = 0
    whole: int = 0
    seconds: float = 0.0

    @property
    def factor(self) -> float:
        """Compression factor of the parameters; 0 where nothing came out."""
        return self.dense / self.pruned if self.pruned else 0.0


def halve(arch: str, image_size: int | None = None, limit: float = 60.0) -> Outcome:
    """Halve the channels of `arch` with Torch-Pruning, at random, and run what comes out.

    Args:
        arch: a name that `zoo.create_model` takes.
        image_size: in pixels; the architecture's reference by default.
        limit: seconds for all of it, from the start of the process.

    Raises:
        ZooError: for an unknown architecture.
    """
    size = image_size or architecture(arch).image_size
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, arch, size))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else Outcome("timeout", seconds=limit)
    except EOFError:
        process.join()
        return Outcome(f"failed: exit status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, arch: str, size: int) -> None:
    sender.send(_halved(arch, size))


def _halved(arch: str, size: int) -> Outcome:
    """The same in this process, with no limit."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module, image = build_model(arch, CLASSES).eval(), torch.rand(1, 3, size, size)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    classifier = [layer for layer in layers if len(layer.weight) == CLASSES]
    widths = {layer: len(layer.weight) for layer in layers if layer not in classifier}
    dense = _parameters(module)
    started = time.perf_counter()
    try:
        torch_pruning.BasePruner(
            module,
            image,
            torch_pruning.importance.RandomImportance(),
            pruning_ratio=0.5,
            ignored_layers=classifier,
        ).step()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            shape = tuple(module(image).shape)
    except Exception as error:  # whatever it or the network raises
        reason = (str(error).strip().splitlines() or [""])[0]
        seconds = time.perf_counter() - started
        return Outcome(f"failed: {type(error).__name__}: {reason}", dense, seconds=seconds)
    pruned = _parameters(module)
    if shape != (1, CLASSES):
        return Outcome(f"failed: gives the shape {shape}", dense, seconds=seconds)
    verdict = "ok" if pruned < LARGEST * dense else "not halved"
    whole = sum(len(layer.weight) == width for layer, width in widths.items())
    return Outcome(verdict, dense, pruned, len(widths), whole, seconds)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main(
    arch: tyro.conf.Positional[str], image_size: int | None = None, limit: float = 60.0
) -> None:
    """Print what becomes of one architecture.

    Args:
        arch: a registered name, torchvision:<name> or timm:<name>.
        image_size: in pixels; the architecture's reference by default.
        limit: seconds after which it is stopped.
    """
    got = halve(arch, image_size, limit)
    print(f"{arch}: {got.verdict}; {got.dense:,} -> {got.pruned:,} parameters ", end="")
    print(f"({got.factor:.2f}x), {got.whole} of {got.layers} layers whole, {got.seconds:.1f} s")


if __name__ == "__main__":
    tyro.cli(main)
