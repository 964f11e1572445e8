"""Time the search's evaluation engine against a plain loop of fine-tunes."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from zoo.data.datasets import ImageSet
from zoo.models import build_model
from zoo.planning.policies import policy_solution
from zoo.search.fidelities import FineTuning, Recalibration
from zoo.search.tasks import Candidate, Task, cut, device, sample
from zoo.search.workers import Pool, pool_of
from zoo.spec.cost import cost_model
from zoo.surgery.surgery import named_tensors
from zoo.tracing.known_groups import reference_groups

ARCH, SIZE, CF = "resnet20-16", 16, 4.0


@dataclass(frozen=True)
class Search:
    """Time one short fine-tune per candidate in a plain loop, the engine, and its recalibration.

    The images are noise, which takes as long as photographs.
    """

    candidates: int = 8
    """random profiles at 4x params"""
    images: int = 10_000
    """training images of the fine-tune"""
    val_images: int = 5_000
    """validation images"""
    rounds: int = 3
    """of each side, by turns; medians are printed"""
    workers: int | None = None
    """processes of the engine; one per core by default"""


def bench_search(config: Search) -> None:
    """Print the speed of the engine at equal fidelity, and of recalibration at equal ranks."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}")
    task = noise_task(config)
    cost = cost_model(reference_groups(ARCH))
    widths = [
        policy_solution("random", cost, CF, "params", n).widths for n in range(config.candidates)
    ]
    candidates = [Candidate(task, own, seed) for seed, own in enumerate(widths)]
    pool = pool_of(config.workers)
    tuned = FineTuning.of(1, config.images, 0.05)
    cheap = Recalibration(1024, 2000)
    run(pool, candidates, Recalibration(64, 500))  # starts the processes
    quarter = config.images // 4
    sides: dict[str, Callable[[], None]] = {
        "naive loop, an epoch": lambda: naive(candidates, config.images, 0),
        "naive loop, an epoch, 2 loader processes": lambda: naive(candidates, config.images, 2),
        "naive loop, a quarter": lambda: naive(candidates, quarter, 0),
        "naive loop, a quarter, 2 loader processes": lambda: naive(candidates, quarter, 2),
        "engine, an epoch": lambda: run(pool, candidates, tuned),
        "engine, recalibration": lambda: run(pool, candidates, cheap),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(config.rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append((time.perf_counter() - started) / len(candidates))
    pool.close()
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    for name, own in medians.items():
        print(f"{name:<44}{own:10.4f} s a candidate")
    for text, loop, side in (
        ("engine, the same fine-tune", "naive loop, an epoch", "engine, an epoch"),
        ("ladder, equal ranks", "naive loop, a quarter", "engine, recalibration"),
        ("ladder, against an epoch", "naive loop, an epoch", "engine, recalibration"),
    ):
        fastest = min(own for name, own in medians.items() if name.startswith(loop))
        print(f"{text:<44}{fastest / medians[side]:8.2f}x the faster {loop}")
    print(
        "By evidence/gate.py recalibration ranks profiles as an epoch of a quarter of the images."
    )


def run(pool: Pool, candidates: list[Candidate], fidelity: FineTuning | Recalibration) -> None:
    for _ in pool.run(candidates, fidelity):
        pass


def noise_task(config: Search) -> Task:
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator)
        labels = torch.randint(0, 10, (count,), generator=generator)
        names = tuple("0123456789")
        return ImageSet("noise", pixels.to(torch.uint8), labels, names, (0.5,) * 3, (0.25,) * 3)

    module = build_model(ARCH, 10, image_size=SIZE).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}
    groups = reference_groups(ARCH).adapted(shapes, SIZE)
    train, val = images(config.images), images(config.val_images)
    return Task("noise", "noise", module, groups, train, val, 0.1, "", ())


class Pictures(Dataset):
    """Images as in torchvision's CIFAR10: stored as an array, given as transformed PIL images."""

    def __init__(self, data: ImageSet, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.pixels: np.ndarray = data.images.permute(0, 2, 3, 1).numpy()
        self.labels, self.transform = data.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def naive(candidates: list[Candidate], images: int, workers: int) -> None:
    """Surgery, DataLoader, fine-tune and validation, one candidate after the other."""
    task = candidates[0].task
    plain = [transforms.ToTensor(), transforms.Normalize(task.train.mean, task.train.std)]
    crop = [transforms.RandomCrop(SIZE, SIZE // 8), transforms.RandomHorizontalFlip()]
    train = Pictures(sample(task.train, images), transforms.Compose([*crop, *plain]))
    val = Pictures(task.val, transforms.Compose(plain))
    for candidate in candidates:
        model = cut(candidate).to(device())
        fit(model, DataLoader(train, 128, shuffle=True, drop_last=True, num_workers=workers))
        validate(model, DataLoader(val, 500, num_workers=workers))


def fit(model: nn.Module, batches: DataLoader) -> None:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(images.to(device())), labels.to(device())).backward()
        optimizer.step()
        falling.step()


def validate(model: nn.Module, batches: DataLoader) -> float:
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in batches:
            correct += int((model(images.to(device())).argmax(1).cpu() == labels).sum())
    return correct / len(batches.dataset)  # type: ignore[arg-type]
