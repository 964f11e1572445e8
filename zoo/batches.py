"""Batches of an image set, cropped, mirrored and normalised as tensors where the network is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.data import ImageSet
from zoo.errors import DataError

__all__ = ["Augmentation", "DeviceLoader", "check_labels"]


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
    """Batches (images, labels) of an `ImageSet` on a device, reshuffled every pass.

    Args:
        data: the image set; its bytes are copied to `device` once.
        batch_size: images per batch; the last batch of a pass may be smaller unless `drop_last`.
        augment: what is done to the images; True for crops and mirroring alone.
        seed: of the shuffling and the augmentation; pass n of seed s is always the same.
        rank, world_size: of the processes that share each pass batch by batch.
        accumulate: batches of each process that belong together. However the images of one step are
            shared out over processes and batches, they are the same, and augmented alike.
    """

    def __init__(
        self,
        data: ImageSet,
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
        self.data = replace(data, images=data.images.to(device), labels=data.labels.to(device))
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
                    yield self._batch(step[own], [draw[own] for draw in draws])

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

    def _batch(self, index: Tensor, draws: list[Tensor]) -> tuple[Tensor, Tensor]:
        index = index.to(self.data.images.device)
        images = self.data.images[index]
        if self.augment.crop:
            images = _moved(images, draws[0], draws[1], draws[2] & self.data.flip)
        if self.augment.rand_augment:
            images = _rand_augmented(images, self.augment.rand_augment, draws[-1])
        return self.data.normalise(images), self.data.labels[index]


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
