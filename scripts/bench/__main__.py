"""Time the zoo against other ways to do the same, in one run; print ratios, without a judgement.

python scripts/bench load
python scripts/bench search
python scripts/bench train
python scripts/bench deploy --out deploy.jsonl
"""

from __future__ import annotations

import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
import tyro
from bench_deploy import Deploy, bench_deploy
from bench_search import Search, bench_search
from bench_train import Train, bench_train
from rival import cut
from torch import nn

import zoo
from zoo.planning.request import planned, request
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan
from zoo.surgery import surgery
from zoo.surgery.surgery import named_tensors
from zoo.tracing.known_groups import groups_of

ARCH, CF = "torchvision:resnet50", 2.0


@dataclass(frozen=True)
class Load:
    """Time a ResNet-50: `load_pruned` and `torch.load`; plan with surgery and Torch-Pruning."""

    repeats: int = 15
    """runs of each side, by turns; medians are printed"""


def bench_load(config: Load) -> None:
    """Print both comparisons."""
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    dense = torchvision.models.resnet50()
    with tempfile.TemporaryDirectory() as scratch:
        compare_loading(dense, Path(scratch), config.repeats)
    compare_pruning(dense.eval(), config.repeats)


def compare_loading(dense: nn.Module, scratch: Path, repeats: int) -> None:
    """Time loading from files in the page cache to a network that is ready to run."""
    file, folder = scratch / "resnet50.pth", scratch / "pruned"
    torch.save(dense.state_dict(), file)
    zoo.save(zoo.load(ARCH, CF, dense, profile="equal"), folder)

    def load_dense() -> None:
        module = torchvision.models.resnet50()
        module.load_state_dict(torch.load(file, weights_only=True))

    def load_dense_on_meta() -> None:
        with torch.device("meta"):
            module = torchvision.models.resnet50()
        module.load_state_dict(torch.load(file, weights_only=True), assign=True)

    ours, usual, lazy = medians(
        repeats, lambda: zoo.load_pruned(folder), load_dense, load_dense_on_meta
    )
    print(f"zoo.load_pruned, {CF:g}x:                             {ours:7.1f} ms")
    print(f"dense: resnet50(), torch.load, load_state_dict: {usual:7.1f} ms  {usual / ours:.2f}x")
    print(f"dense: the same built on the meta device:       {lazy:7.1f} ms  {lazy / ours:.2f}x")


def compare_pruning(dense: nn.Module, repeats: int) -> None:
    """Time pruning a dense network in memory; both sides keep the same channels."""
    asked = request("equal", ARCH, cf=CF)
    image = torch.zeros(1, 3, 224, 224)

    def ours() -> tuple[nn.Module, ChannelGroups, Plan]:
        groups = groups_of(ARCH, dense, 224)
        plan = planned(dense, groups, asked, None)
        return surgery.apply(dense, groups, plan), groups, plan

    pruned, groups, plan = ours()
    # Torch-Pruning prunes in place: every run gets a copy, made before it is timed
    copies = iter([copy.deepcopy(dense) for _ in range(repeats + 2)])

    def theirs() -> nn.Module:
        return cut(next(copies), groups, plan, image)

    shapes = [{n: t.shape for n, t in named_tensors(m).items()} for m in (pruned, theirs())]
    assert shapes[0] == shapes[1]

    def copied() -> list[torch.Tensor]:
        return [tensor.clone() for tensor in named_tensors(pruned).values()]

    fast, slow, floor = medians(repeats, ours, theirs, copied)
    print(f"zoo: stored groups, plan, surgery:              {fast:7.1f} ms")
    print(f"Torch-Pruning: build, prune the same channels:  {slow:7.1f} ms  {slow / fast:.2f}x")
    print(f"the least: copying the pruned tensors alone:    {floor:7.1f} ms  {slow / floor:.2f}x")


def medians(repeats: int, *sides: Callable[[], object]) -> list[float]:
    """Median milliseconds of each side; they take turns, and the first run is not counted."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(repeats + 1):
        for own, side in zip(times, sides, strict=True):
            started = time.perf_counter()
            side()
            if turn:
                own.append(1000 * (time.perf_counter() - started))
    return [statistics.median(own) for own in times]


BENCHES = {
    "load": (Load, bench_load),
    "search": (Search, bench_search),
    "train": (Train, bench_train),
    "deploy": (Deploy, bench_deploy),
}

if __name__ == "__main__":
    flags = {name: kind for name, (kind, _) in BENCHES.items()}
    chosen = tyro.extras.subcommand_cli_from_dict(flags)
    next(run for kind, run in BENCHES.values() if isinstance(chosen, kind))(chosen)
