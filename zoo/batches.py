"""Batches of an image set, cropped, mirrored and normalised as tensors where the network is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.errors import DataError
from zoo.images import AnyImages, ImageFiles, ImageSet

__all__ = ["Augmentation", "DeviceLoader", "check_labels"]


WORKERS = 8
"""Most processes that decode files."""

Share = tuple[Tensor, list[Tensor]]
"""One batch to be made: the indices of its images, and the random numbers of each."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Attributes:
        crop: random crops after reflecting one eighth of the side, and mirroring if the set allows.
        rand_augment: magnitude of RandAugment's two operations per image, 1 to 30; 0 for none.
    """

    crop: bool = True
    rand_augment: int = 0


class DeviceLoader:
    """Batches (images, labels) of an image set on a device, reshuffled every pass.

    Args:
        data: the images. Those in memory are copied to `device` once, files are decoded and
            augmented by worker processes; the batches are the same.
        batch_size: images per batch; the last batch of a pass may be smaller unless `drop_last`.
        augment: what is done to the images; True for crops and mirroring alone.
        seed: of the shuffling and the augmentation; pass n of seed s is always the same.
        rank, world_size: of the processes that share each pass batch by batch.
        accumulate: batches of each process that belong together. However the images of one step are
            shared out over processes and batches, they are the same, and augmented alike.
    """

    def __init__(
        self,
        data: AnyImages,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        augment: bool | Augmentation = False,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        if isinstance(data, ImageSet):
            data = replace(data, images=data.images.to(device))
        self.data = data
        self.device, self.labels = device, data.labels.to(device)
        self.batch_size = batch_size
        self.augment = augment if isinstance(augment, Augmentation) else Augmentation(augment)
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.epoch = 0

    def __len__(self) -> int:
        share = len(self.data) // self.world_size
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        made: Iterable[tuple[Tensor, Tensor]]
        if isinstance(self.data, ImageFiles):
            made = _by_workers(self.data, list(self._plan(generator)), self.augment)
        else:
            made = (_made(self.data, own, self.augment) for own in self._plan(generator))
        for images, index in made:
            images = self.data.normalise(images.to(self.device))
            yield images, self.labels[index.to(self.device)]

    def _plan(self, generator: torch.Generator) -> Iterator[Share]:
        count = len(self.data)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        together = self.batch_size * self.world_size
        if self.drop_last:
            order = order[: count - count % together]
        for step in order.split(together * self.accumulate):
            draws = self._draw(len(step), generator)
            for batch in torch.arange(len(step)).split(together):
                share = len(batch) // self.world_size
                if share:
                    own = batch[self.rank * share : (self.rank + 1) * share]
                    yield step[own], [draw[own] for draw in draws]

    def _draw(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """The random numbers of `count` images, one row of each tensor per image."""
        draws = []
        if self.augment.crop:
            span = 2 * _margin(self.data.image_size) + 1
            draws += list(torch.randint(span, (2, count, 1), generator=generator))
            draws.append(torch.rand(count, 1, generator=generator) < 0.5)
        if self.augment.rand_augment:
            draws.append(torch.randint(2**62, (count,), generator=generator))
        return draws


def _made(data: AnyImages, own: Share, augment: Augmentation) -> tuple[Tensor, Tensor]:
    """One batch of uint8 images, augmented, and the indices that they have in `data`."""
    index, draws = own
    images = data.gather(index)
    if augment.crop:
        images = _moved(images, draws[0], draws[1], draws[2] & data.flip)
    if augment.rand_augment:
        images = _rand_augmented(images, augment.rand_augment, draws[-1])
    return images, index


@dataclass(frozen=True)
class _Work(Dataset):
    """The batches of a pass, each as one item, so that a worker makes it whole."""

    data: ImageFiles
    plan: list[Share]
    augment: Augmentation

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return _made(self.data, self.plan[number], self.augment)


def _by_workers(
    data: ImageFiles, plan: list[Share], augment: Augmentation
) -> Iterator[tuple[Tensor, Tensor]]:
    batches = DataLoader(
        _Work(data, plan, augment),
        batch_size=None,
        num_workers=min(WORKERS, os.cpu_count() or 1, len(plan)),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the caller's random state is left alone
    )
    try:
        yield from batches
    except DataError as error:  # told with the worker's traceback, of which this is the last line
        told = str(error).strip().splitlines()[-1]
        raise DataError(told.rpartition(f"{DataError.__name__}: ")[2]) from None


def _margin(size: int) -> int:
    """Pixels that a crop may move."""
    return max(1, size // 8)


def _moved(images: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Crops of the reflected images (N, 3, S, S) at offsets (N, 1), or their mirror images."""
    count, _, size, _ = images.shape
    steps = torch.arange(size) - _margin(size)
    rows, columns = (_reflect(shift + steps, size) for shift in (down, right))
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    pick = torch.arange(count, device=images.device)[:, None, None]
    # Advanced indices around a slice put the sliced axis (channels) last.
    return images[pick, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Positions beyond the edges of `size` pixels, mirrored back in without repeating the edge."""
    return (size - 1) - (size - 1 - positions.abs()).abs()


def _rand_augmented(images: Tensor, magnitude: int, seeds: Tensor) -> Tensor:
    """Two random operations on each uint8 image, from its own seed."""
    from torchvision.transforms import v2

    operations = v2.RandAugment(magnitude=magnitude)
    with torch.random.fork_rng(devices=[]):
        changed = []
        for image, seed in zip(images, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach CUDA's too
            changed.append(operations(image))
    return torch.stack(changed)


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels (N,) that a network with these outputs (N, classes) cannot be asked for.

    Raises:
        DataError: for a label below 0 or beyond the outputs, or outputs of another shape.
    """
    if logits.ndim != 2:
        raise DataError(f"Expected logits (N, classes), the network gives {tuple(logits.shape)}.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise DataError(
            f"The data has labels from {low} to {high}, but the network has {logits.shape[1]} "
            f"outputs."
        )
