"""Run Torch-Pruning on one architecture: does its own pruner halve every layer's channels?

    python scripts/bench/rival.py timm:resnet18

It runs in a process of its own, because it can hang; that is killed at a time limit. `cut` makes it
remove the channels that a plan of the zoo removes.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch_pruning
import tyro
from torch import Tensor, nn

from zoo.errors import first_line
from zoo.models import architecture, build_model, parameter_count
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan

__all__ = ["Outcome", "cut", "halve", "in_own_process"]

Result = TypeVar("Result")

CLASSES = 37
"""Classes: the classifier, which stays whole, is known by this width, which no other layer has."""
LARGEST = 0.6
"""Largest share of parameters left: half the channels everywhere leave a quarter to a half."""


@dataclass(frozen=True)
class Outcome:
    """The result for one network.

    Attributes:
        verdict: `ok`, `not halved`, `timeout` or `failed: <reason>`.
        dense, pruned: parameters before and after; `pruned` is 0 after a failure.
        layers, whole: convolutions and dense layers without the classifier, and how many of them
            lost no output.
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
        """Compression factor of the parameters; 0 after a failure."""
        return self.dense / self.pruned if self.pruned else 0.0


def halve(arch: str, image_size: int | None = None, limit: float = 60.0) -> Outcome:
    """Remove a random half of the channels of `arch` with Torch-Pruning, and run the result.

    Args:
        arch: a name that `zoo.create_model` takes.
        image_size: in pixels; the architecture's reference by default.
        limit: seconds for all of it, from the start of the process.

    Raises:
        ZooError: for an unknown architecture.
    """
    size = image_size or architecture(arch).image_size
    try:
        return in_own_process(limit, _halved, arch, size)
    except TimeoutError:
        return Outcome("timeout", seconds=limit)
    except ChildProcessError as error:
        return Outcome(f"failed: {error}")


def cut(module: nn.Module, groups: ChannelGroups, plan: Plan, image: Tensor) -> nn.Module:
    """Remove the channels that `plan` removes from `module` itself, by Torch-Pruning.

    It is given the indices of one layer per channel group, and has to find the rest by itself.
    """
    graph = torch_pruning.DependencyGraph().build_dependency(module, image, verbose=False)
    for group in groups.groups:
        filters = group.filters[0]
        rows = [slot for slot in group.filter_slots if slot.tensor == filters]
        removed = set(range(group.size)).difference(plan.kept[group.name])
        gone = [position for slot in rows for unit in removed for position in slot.positions(unit)]
        layer = module.get_submodule(filters.removesuffix(".weight"))
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, prune, gone).prune()
    return module


def in_own_process(limit: float, function: Callable[..., Result], *arguments: Any) -> Result:
    """The result of `function` in a process of its own, so that a crash does not end this one.

    Raises:
        TimeoutError: if it has not answered after `limit` seconds; the process is killed.
        ChildProcessError: with the exit status, if the process ends without an answer.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, *arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise TimeoutError(f"no answer in {limit:.0f} s")
        return receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"exit status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _answer(sender: Connection, function: Callable[..., object], *arguments: Any) -> None:
    sender.send(function(*arguments))


def _halved(arch: str, size: int) -> Outcome:
    """As `halve`, in this process and with no limit."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module, image = build_model(arch, CLASSES).eval(), torch.rand(1, 3, size, size)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    classifier = [layer for layer in layers if len(layer.weight) == CLASSES]
    widths = {layer: len(layer.weight) for layer in layers if layer not in classifier}
    dense = parameter_count(module)
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
        reason = first_line(error)
        seconds = time.perf_counter() - started
        return Outcome(f"failed: {type(error).__name__}: {reason}", dense, seconds=seconds)
    pruned = parameter_count(module)
    if shape != (1, CLASSES):
        return Outcome(f"failed: gives the shape {shape}", dense, seconds=seconds)
    verdict = "ok" if pruned < LARGEST * dense else "not halved"
    whole = sum(len(layer.weight) == width for layer, width in widths.items())
    return Outcome(verdict, dense, pruned, len(widths), whole, seconds)


def main(
    arch: tyro.conf.Positional[str], image_size: int | None = None, limit: float = 60.0
) -> None:
    """Print the outcome for one architecture.

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
