"""Turn a user's data (a name, a Dataset, a DataLoader) into batches for a network."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from zoo.common.sizes import sides
from zoo.data.batches import WORKERS, Augmentation, DeviceLoader, check_pair, collated
from zoo.data.datasets import AnyImages, load_data
from zoo.errors import DataError
from zoo.spec.plans import record_of
from zoo.training.recipes import Recipe

__all__ = ["Data", "found", "measured_batches", "training_batches"]

Data = Dataset[Any] | DataLoader[Any] | str

EVALUATED_AT_ONCE, PIXELS_AT_ONCE = 500, 2**22
"""Largest batches in evaluation, in images and in pixels of all of them."""

PIXELS_PER_THREAD, LEAST_PER_THREAD = 2**14, 4
"""Of a batch in evaluation on a CPU, in pixels and at least images: so many that the activations of
most networks stay in its cache. Larger ones are slower (docs/benchmarks.md).
"""


def found(data: Data, split: str, model: nn.Module) -> Dataset[Any] | DataLoader[Any]:
    """`data` itself, or the `split` of the data set that it names.

    `cifar10@FOLDER` says where the files of a data set are. The images of a named data set have the
    size that a pruned `model` is for, or else 32 pixels per side.

    Raises:
        DataError: for data of another type, or without a length.
    """
    if isinstance(data, str):
        name, _, folder = data.partition("@")
        if ":" in name:  # in imagefolder:PATH and hf:ORG/NAME@REVISION, @ names no folder
            name, folder = data, ""
        record = record_of(model)
        size = 32 if record is None else record.size
        splits = load_data(name, Path(folder) if folder else None, size=size)
        named: AnyImages = getattr(splits, split)
        return named
    if not isinstance(data, Dataset | DataLoader):
        raise DataError(
            f"The {split} data must be a torch Dataset or DataLoader, or the name of a data set; "
            f"got {type(data).__name__}."
        )
    if isinstance(getattr(data, "dataset", data), IterableDataset):
        raise DataError(
            f"The {split} data, a {type(data).__name__}, has no length to plan a training by: give "
            "a Dataset with __len__ and __getitem__, or a DataLoader of one."
        )
    return data


def training_batches(
    data: Dataset[Any] | DataLoader[Any], recipe: Recipe, accelerator: Accelerator, seed: int
) -> Any:
    """Shuffled batches of `data`, divided between the accelerator's processes.

    Raises:
        DataError: if there are none, the recipe's RandAugment cannot be applied to this data, or a
            DataLoader with an `__iter__` of its own would have to be divided.
    """
    size, processes = recipe.batch_size, accelerator.num_processes
    batches: Any
    if isinstance(data, AnyImages):
        batches = DeviceLoader(
            data,
            size,
            device=accelerator.device,
            augment=Augmentation(recipe.augment, recipe.crop_scale, recipe.rand_augment),
            shuffle=True,
            drop_last=len(data) >= size * processes,
            seed=seed,
            rank=accelerator.process_index,
            world_size=processes,
            accumulate=recipe.accumulate,
        )
    else:
        if recipe.rand_augment:
            raise DataError(
                f"rand_augment={recipe.rand_augment} is for the zoo's own image sets: put "
                "torchvision.transforms.v2.RandAugment into the transforms of the "
                f"{type(data).__name__}."
            )
        if isinstance(data, Dataset):
            whole = len(data) >= size * processes  # type: ignore[arg-type]
            data = _loader(data, size, accelerator.device, seed, shuffle=True, drop_last=whole)
        prepared = getattr(data, "_is_accelerate_prepared", False)
        if prepared or type(data).__iter__ is DataLoader.__iter__:
            # an accelerator's loader tells the sampler the epoch
            batches = accelerator.prepare_data_loader(data, device_placement=False)
        elif processes == 1:
            batches = data
        else:
            raise DataError(
                f"{type(data).__name__} has an __iter__ of its own, and its batches cannot be "
                f"divided between {processes} processes: train in one, or move it into the Dataset."
            )
    if len(batches) == 0:
        few = len(data.dataset if isinstance(data, DataLoader) else data)  # type: ignore[arg-type]
        raise DataError(
            f"The training data holds {few or 'no'} images{', less than one batch' if few else ''}."
        )
    return batches


def measured_batches(
    data: Dataset[Any] | DataLoader[Any] | Iterable[Any],
    device: torch.device,
    batch_size: int | None = None,
    seed: int = 0,
) -> Any:
    """Batches of `data` in order, of a size that fits most memories; given batches unchanged."""
    if isinstance(data, AnyImages):
        pixels = math.prod(sides(data.image_size))
        return DeviceLoader(data, batch_size or _at_once(pixels, device), device=device)
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size or EVALUATED_AT_ONCE, collate_fn=collated)
    if isinstance(data, Dataset):
        return _loader(data, batch_size, device, seed)
    return data


def _loader(
    data: Dataset[Any],
    batch_size: int | None,
    device: torch.device,
    seed: int,
    shuffle: bool = False,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """A DataLoader of `data`, with worker processes if the network is on a GPU.

    Raises:
        DataError: if it is empty, or gives no pairs of an image and its label.
    """
    if len(data) == 0:  # type: ignore[arg-type]
        raise DataError("The data holds no images.")
    first, _ = check_pair(data[0])
    # tensors on a GPU can neither come from worker processes nor be pinned
    elsewhere = device.type == "cuda" and not first.is_cuda
    return DataLoader(
        data,
        batch_size or _at_once(first[0].numel(), device),
        shuffle=shuffle,
        num_workers=min(WORKERS, os.cpu_count() or 1) if elsewhere else 0,
        generator=torch.Generator().manual_seed(seed),
        drop_last=drop_last,
        pin_memory=elsewhere,
        collate_fn=collated,
    )


def _at_once(pixels: int, device: torch.device) -> int:
    """The batch size of evaluation for images of `pixels` pixels each."""
    most = max(1, min(EVALUATED_AT_ONCE, PIXELS_AT_ONCE // max(1, pixels)))
    if device.type != "cpu":
        return most
    return min(most, torch.get_num_threads() * max(LEAST_PER_THREAD, PIXELS_PER_THREAD // pixels))
