"""Time what this project wrote itself beside the library not taken (docs/decisions.md).

    python scripts/bench/libraries.py

The two sides take turns, and the medians of one run are printed. cattrs is not a dependency: its
row appears only if it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
import tyro
from scipy import stats
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import zoo
from zoo.common.correlation import rank_correlation
from zoo.common.documents import decode, encode
from zoo.data.rand_augment import KINDS, PER_IMAGE, rand_augmented
from zoo.search.certificate import rank
from zoo.spec.groups import Group
from zoo.tracing.known_groups import groups_of
from zoo.training.averaging import WeightAverage

Side = Callable[[], Any]


def main(repeats: int = 15) -> None:
    """Print one row for each decision."""
    torch.set_num_threads(1)
    print(f"one thread, torch {torch.__version__}, medians of {repeats}\n")
    print(f"{'what':28}{'here, ms':>10}{'library, ms':>13}{'ratio':>8}")
    for what, here, library in comparisons():
        for side in (here, library):
            side()
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for side, seconds in zip((here, library), times, strict=True):
                started = time.perf_counter()
                side()
                seconds.append(1000 * (time.perf_counter() - started))
        ours, theirs = map(statistics.median, times)
        print(f"{what:28}{ours:10.2f}{theirs:13.2f}{theirs / ours:8.2f}")


def comparisons() -> list[tuple[str, Side, Side]]:
    """(what, the project's own, the library's)."""
    rng = np.random.default_rng(0)
    left, right = rng.random((2, 200))
    accuracies = left.tolist()
    found: list[tuple[str, Side, Side]] = [
        (
            "Spearman, 200 pairs",
            lambda: rank_correlation(left, right),
            lambda: stats.spearmanr(left, right),
        ),
        (
            "Clopper-Pearson, 200 trials",
            lambda: rank(0.9, accuracies),
            lambda: stats.binomtest(sum(left >= 0.9), 200).proportion_ci(0.95, "exact"),
        ),
        *(averaging(name) for name in ("resnet18", "densenet121")),
        *(augmenting(side) for side in (32, 224)),
    ]
    if importlib.util.find_spec("cattrs"):
        found.append(documents())
    return found


def averaging(arch: str) -> tuple[str, Side, Side]:
    """One update of the average of a network's weights and buffers."""
    network = torchvision.models.get_model(arch)
    average = WeightAverage(network, 0.999)
    library = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    return (
        f"weight average, {arch}",
        lambda: average.update(network, 1),
        lambda: library.update_parameters(network),
    )


def augmenting(side: int) -> tuple[str, Side, Side]:
    """RandAugment of 64 images, each with operations of its own."""
    images = torch.randint(256, (64, 3, side, side), dtype=torch.uint8)
    draws = torch.randint(KINDS, (len(images), PER_IMAGE))
    library = v2.RandAugment(num_ops=PER_IMAGE, magnitude=9)
    return (
        f"RandAugment, 64 at {side} px",
        lambda: rand_augmented(images, 9, draws),
        lambda: each(library, images),
    )


def each(transform: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Transform image by image, because a transform draws only once for a whole batch."""
    return torch.stack([transform(image) for image in images])


def documents() -> tuple[str, Side, Side]:
    """Decoding the channel groups of a ResNet-50 from the values of their JSON."""
    import cattrs

    arch = "torchvision:resnet50"
    groups = groups_of(arch, zoo.create_model(arch, 1000), (224, 224)).groups
    raw = encode(groups)
    library = functools.partial(
        cattrs.Converter(forbid_extra_keys=True).structure, raw, tuple[Group, ...]
    )
    return "JSON of resnet50's groups", lambda: decode(tuple[Group, ...], raw, "groups"), library


if __name__ == "__main__":
    tyro.cli(main)
