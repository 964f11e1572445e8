"""Time the training loop of `zoo.finetune` against a textbook loop, on one network."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from bench_search import Pictures
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchvision import transforms

import zoo
from zoo.data.datasets import ImageSet
from zoo.models import build_model
from zoo.planning.latency import device_name
from zoo.training.finetuning import TrainResult

HEAVY = ("conv", "batch_norm")
"""Parts of the names of the operators of convolution and batch norm, and of their backward."""


@dataclass(frozen=True)
class Train:
    """Time `zoo.finetune` and a textbook loop (DataLoader with two workers, fp32), by turns.

    The images are noise, which takes as long as photographs.
    """

    arch: str = "resnet20-16"
    """architecture with a bundled profile"""
    cf: float = 4.0
    """compression factor"""
    images: int = 10_000
    """training images"""
    val_images: int = 5_000
    """validation images of the run that is timed as a whole"""
    size: int = 32
    """pixels per side"""
    batch_size: int = 128
    """images per step"""
    epochs: int = 1
    """of every training"""
    rounds: int = 3
    """of each side; medians are printed"""


def bench_train(config: Train) -> None:
    """Print images per second of every side, the time of a whole training, and where it goes."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    network = zoo.load(config.arch, config.cf, build_model(config.arch, 10))
    data = noise(config, config.images)
    recipe = zoo.Recipe(epochs=config.epochs, batch_size=config.batch_size, lr=0.05)

    def ours(val: ImageSet | None = None) -> TrainResult:
        return zoo.finetune(copy.deepcopy(network), data, val, teacher=None, recipe=recipe)

    def theirs() -> None:
        textbook(copy.deepcopy(network).to(device), data, config, device)

    def measure(batch_size: int | None = None) -> None:
        zoo.evaluate(network.to(device), val, batch_size=batch_size)

    val, seen = noise(config, config.val_images), config.images - config.images % config.batch_size
    compare({"zoo.finetune": ours, "textbook loop, fp32": theirs}, config.epochs * seen, config)
    large = partial(measure, 500)
    compare({"zoo.evaluate": measure, "in batches of 500": large}, config.val_images, config)
    if cuda:
        rate = captured(copy.deepcopy(network).to(device), data, config.batch_size)
        print(f"{'CUDA graph of a step':<24}{rate:10,.0f} images/s, with no data loaded")
    whole = ours(val)
    print(
        f"{config.epochs} epochs of {config.images:,} images, with the set-up and a validation on "
        f"{config.val_images:,} after each: {whole.seconds:.1f} s"
    )
    print(f"Of an epoch's time, {outside(ours, cuda):.1%} is outside convolution and norm.")


def noise(config: Train, count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, config.size, config.size)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return ImageSet("noise", pixels, labels, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)


def textbook(model: nn.Module, data: ImageSet, config: Train, device: torch.device) -> None:
    """Train for some epochs, as a tutorial would."""
    steps = [
        transforms.RandomCrop(data.image_size, data.image_size // 8, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(data.mean, data.std),
    ]
    pictures = Pictures(data, transforms.Compose(steps))
    batches = DataLoader(pictures, config.batch_size, shuffle=True, drop_last=True, num_workers=2)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    model.train()
    for _ in range(config.epochs):
        for images, labels in batches:
            loss = functional.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def captured(model: nn.Module, data: ImageSet, batch_size: int, steps: int = 200) -> float:
    """Images per second of one step in bf16, captured as a CUDA graph and replayed."""
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = data.normalise(data.images[:batch_size]).cuda()
    images = images.to(memory_format=torch.channels_last)
    labels = data.labels[:batch_size].cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        graph.replay()
    torch.cuda.synchronize()
    return steps * batch_size / (time.perf_counter() - started)


def compare(sides: dict[str, Callable[[], object]], images: int, config: Train) -> None:
    """Print the median images per second of each side, and its ratio to that of the last one.

    The sides take turns, and the first round is not counted.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(config.rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                rates[name].append(images / (time.perf_counter() - started))
    medians = {name: statistics.median(own) for name, own in rates.items()}
    *_, last = medians.values()
    for name, rate in medians.items():
        print(f"{name:<24}{rate:10,.0f} images/s  {rate / last:6.2f}x")


def outside(side: Callable[[], TrainResult], cuda: bool) -> float:
    """The share of the epochs' time that is not spent in `HEAVY` operators.

    On a CPU, the profiler slows the operators and everything between them alike. It does not slow a
    GPU's operators, so their time is compared with that of a training without the profiler.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        trained = side()
    seconds = sum(epoch.seconds for epoch in (side() if cuda else trained).history)
    heavy = sum(
        event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in found.key_averages()
        if event.key.startswith("aten::") and any(word in event.key for word in HEAVY)
    )
    return 1 - heavy / 1e6 / seconds
