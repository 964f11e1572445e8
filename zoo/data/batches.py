"""Batches of an image set: augmented and normalised tensors on the network's device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from zoo.common.sizes import sides
from zoo.data.images import AnyImages, ImageFiles, ImageSet, sent
from zoo.errors import DataError

__all__ = [
    "Augmentation",
    "DeviceLoader",
    "check_labels",
    "check_logits",
    "check_pair",
    "checked_batch",
    "collated",
]


WORKERS = 8
"""Maximum number of processes that decode files."""

Share = tuple[Tensor, Tensor, Tensor]
"""One batch to make: (indices, moves, changes). `indices` (N,) choose its images. `moves` are
(N, 3): shift down, shift right, mirrored; or (N, 5): box to resize (4), mirrored. `changes` are
RandAugment's draws, which stay on the CPU."""


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented.

    Attributes:
        crop: random crops after reflection padding by one eighth of each side, and mirroring if
            the set allows.
        scale: if below 1, crops cover from this share to all of the image's area, and are resized.
        rand_augment: magnitude of RandAugment's two operations per image, 1 to 30; 0 for none.
    """

    crop: bool = True
    scale: float = 1.0
    rand_augment: int = 0


class DeviceLoader:
    """Batches (images, labels) of an image set on a device, reshuffled every pass.

    Args:
        data: the images. Those in memory are copied to `device` once, files are decoded and
            augmented by worker processes; the batches are the same.
        batch_size: images per batch; the last batch of a pass may be smaller unless `drop_last`.
        augment: the augmentation; True for crops and mirroring alone.
        seed: of the shuffling and the augmentation; pass n of seed s is always the same.
        rank, world_size: of the processes, each of which takes its own batches of a pass.
        accumulate: batches of each process per optimiser step. A step has the same images, with the
            same augmentation, however they are divided into processes and batches.
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
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        self.epoch += 1
        plan = list(self._plan(generator))
        made: Iterable[tuple[Tensor, Tensor]]
        if isinstance(self.data, ImageFiles):
            made = _by_workers(self.data, plan, self.augment, torch.device(self.device))
        else:
            made = (_made(self.data, own, self.augment) for own in _on(self.device, plan))
        for images, index in made:
            images = self.data.normalise(images.to(self.device, non_blocking=True))
            yield images, self.labels[index.to(self.device, non_blocking=True)]

    def _plan(self, generator: torch.Generator) -> Iterator[Share]:
        count = len(self.data)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        together = self.batch_size * self.world_size
        if self.drop_last:
            order = order[: count - count % together]
        for step in order.split(together * self.accumulate):
            moves, changes = self._draw(len(step), generator)
            for batch in torch.arange(len(step)).split(together):
                share = len(batch) // self.world_size
                if share:
                    own = batch[self.rank * share : (self.rank + 1) * share]
                    yield step[own], moves[own], changes[own]

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The random `moves` and `changes` of `count` images, as in `Share`."""
        moves = changes = torch.empty(count, 0, dtype=torch.long)
        if self.augment.crop:
            if self.augment.scale < 1:
                moves = _boxes(count, self.augment.scale, generator)
            else:
                spans = [2 * _margin(side) + 1 for side in sides(self.data.image_size)]
                shifts = [torch.randint(n, (count, 1), generator=generator) for n in spans]
                moves = torch.cat(shifts, dim=1)
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            moves = torch.cat([moves, mirrored & self.data.flip], dim=1)
        if self.augment.rand_augment:
            from zoo.data.rand_augment import KINDS, PER_IMAGE

            changes = torch.randint(KINDS, (count, PER_IMAGE), generator=generator)
        return moves, changes


def _on(device: torch.device | str, plan: list[Share]) -> Iterator[Share]:
    """`plan` with its indices and moves on `device`, copied there once for all batches."""
    if not plan:
        return
    indices, moves, changes = zip(*plan, strict=True)
    sizes = [len(own) for own in indices]
    there = (sent(torch.cat(parts), device).split(sizes) for parts in (indices, moves))
    yield from zip(*there, changes, strict=True)


def _made(data: AnyImages, own: Share, augment: Augmentation) -> tuple[Tensor, Tensor]:
    """One batch of augmented uint8 images, and their indices in `data`."""
    index, moves, changes = own
    if augment.crop and augment.scale < 1:
        images = data.gather(index, moves[:, :4])
        images = torch.where(moves[:, 4, None, None, None].bool(), images.flip(3), images)
    else:
        images = data.gather(index)
        images = _moved(images, moves) if augment.crop else images
    if augment.rand_augment:
        from zoo.data.rand_augment import rand_augmented

        images = rand_augmented(images, augment.rand_augment, changes)
    return images, index


@dataclass(frozen=True)
class _Work(Dataset[Any]):
    """The batches of a pass as items of a Dataset, so that one worker makes a whole batch."""

    data: ImageFiles
    plan: list[Share]
    augment: Augmentation

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return _made(self.data, self.plan[number], self.augment)


def _by_workers(
    data: ImageFiles, plan: list[Share], augment: Augmentation, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    batches = DataLoader(
        _Work(data, plan, augment),
        batch_size=None,
        num_workers=min(WORKERS, os.cpu_count() or 1, len(plan)),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the caller's random state is left alone
    )
    try:
        yield from batches
    except DataError as error:  # its text is the worker's traceback, ending with the message
        told = str(error).strip().splitlines()[-1]
        raise DataError(told.rpartition(f"{DataError.__name__}: ")[2]) from None


def _margin(side: int) -> int:
    """Maximum shift of a crop along a side, in pixels."""
    return max(1, side // 8)


def _boxes(count: int, scale: float, generator: torch.Generator) -> Tensor:
    """Random boxes (N, 4): area from `scale` to 1, aspect ratio 3:4 to 4:3 where that fits."""
    area, form, across, down = torch.rand(4, count, generator=generator)
    area, form = scale + (1 - scale) * area, (4 / 3) ** (2 * form - 1)
    width, height = (area * form).sqrt().clamp(max=1), (area / form).sqrt().clamp(max=1)
    left, top = across * (1 - width), down * (1 - height)
    return torch.stack([left, top, left + width, top + height], dim=1).clamp(max=1)


def _moved(images: Tensor, moves: Tensor) -> Tensor:
    """Reflection-padded crops of images (N, 3, H, W), some mirrored, as `moves` (N, 3) say."""
    count, _, height, width = images.shape
    down, right, mirrored = moves.split(1, dim=1)
    rows, columns = _shifted(down, height), _shifted(right, width)
    columns = torch.where(mirrored.bool(), columns.flip(1), columns)
    pick = torch.arange(count, device=images.device)[:, None, None]
    # Advanced indices around a slice put the sliced axis (channels) last.
    return images[pick, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _shifted(by: Tensor, side: int) -> Tensor:
    """Pixel indices (N, side) along a side, shifted by `by` (N, 1) less the margin.

    Indices beyond an edge are reflected back, without repeating the edge pixel.
    """
    positions = by + torch.arange(side, device=by.device) - _margin(side)
    return (side - 1) - (side - 1 - positions.abs()).abs()


def check_pair(item: Any) -> tuple[Any, Any]:
    """`item` of a data set as a pair: one image and its label, or a batch of both.

    Raises:
        DataError: if it is no pair, or its images are not tensors.
    """
    if not isinstance(item, tuple | list) or len(item) != 2:
        kind = f"{len(item)} things" if isinstance(item, tuple | list) else type(item).__name__
        raise DataError(f"The data should give pairs (image, label), it gives {kind}.")
    image, label = item
    if not isinstance(image, Tensor):
        raise DataError(
            f"The images are {type(image).__name__}, not tensors: put torchvision.transforms.v2."
            "ToImage() and ToDtype(torch.float32, scale=True) into the data's transforms."
        )
    return image, label


def collated(samples: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Samples (image, label) as a batch.

    Raises:
        DataError: as `check_pair`, and for images of several shapes.
    """
    shapes = {tuple(check_pair(sample)[0].shape) for sample in samples}
    if len(shapes) > 1:
        raise DataError(
            f"The images have several shapes ({', '.join(map(str, sorted(shapes)))}): put "
            "torchvision.transforms.v2.Resize or a crop into the data's transforms."
        )
    images, labels = default_collate(list(samples))
    return images, labels


def checked_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """`batch` as images (N, C, H, W) and class numbers (N,).

    Raises:
        DataError: unless images are floats (N, C, H, W) and labels integers (N,).
    """
    images, labels = check_pair(batch)
    if not isinstance(labels, Tensor):
        raise DataError(f"Labels must be integers (N,), the data has {type(labels).__name__}.")
    if images.ndim != 4:
        raise DataError(
            f"Images must come in batches (N, C, H, W), the data has {tuple(images.shape)}."
        )
    if not images.is_floating_point():
        raise DataError(
            f"The images are {images.dtype}, not floats: put torchvision.transforms.v2.ToDtype("
            "torch.float32, scale=True) into the data's transforms."
        )
    if labels.ndim != 1 or labels.is_floating_point():
        raise DataError(
            f"Labels must be integers (N,), the data has {labels.dtype} {tuple(labels.shape)}."
        )
    return images, labels


def check_labels(labels: Tensor, logits: Any) -> None:
    """Check that labels (N,) are class numbers of logits (N, classes).

    Raises:
        DataError: for a label outside 0 to classes - 1, or logits of another type or shape.
    """
    check_logits(logits)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise DataError(
            f"The data has labels from {low} to {high}, but the network has {logits.shape[1]} "
            f"outputs."
        )


def check_logits(logits: Any, who: str = "network") -> None:
    """Check that what the network `who` gives is logits (N, classes).

    Raises:
        DataError: if it is of another type or shape.
    """
    if not isinstance(logits, Tensor):
        parts = f" of {', '.join(map(str, logits))}" if isinstance(logits, Mapping) else ""
        raise DataError(
            f"Expected logits (N, classes), the {who} gives {type(logits).__name__}"
            f"{parts}. Wrap it in a module whose forward returns its logits alone."
        )
    if logits.ndim != 2:
        raise DataError(f"Expected logits (N, classes), the {who} gives {tuple(logits.shape)}.")
