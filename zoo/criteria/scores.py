"""Criteria: which channels of a group to keep. One score per channel; the highest stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from zoo.common.seeding import undisturbed
from zoo.criteria.data_scores import (
    Batches,
    apoz_scores,
    fisher_scores,
    obd_scores,
    snip_scores,
    taylor_features,
    taylor_scores,
    taylor_weight_scores,
)
from zoo.criteria.filter_agent import reinforce_scores
from zoo.criteria.weight_scores import (
    Scores,
    bn_scale_scores,
    fpgm_scores,
    l1_scores,
    l2_scores,
    random_scores,
    synflow_scores,
)
from zoo.data.batches import DeviceLoader, checked_batch, collated
from zoo.data.datasets import AnyImages
from zoo.errors import DataError, ZooError, first_line, unknown
from zoo.spec.groups import ChannelGroups
from zoo.surgery.surgery import evaluating

__all__ = [
    "CRITERIA",
    "Criterion",
    "channel_scores",
    "labelled_batches",
    "random_scores",
    "taylor_features",
]


def labelled_batches(
    data: Dataset[Any] | DataLoader[Any], device: torch.device | str, seed: int, count: int = 1024
) -> Batches:
    """At least `count` images of `data`, or all there are, in batches (images, labels) on `device`.

    A Dataset is shuffled by `seed`, because many are sorted by class. Of a DataLoader or an
    IterableDataset, the first are taken. The caller's random state is left alone.

    Raises:
        DataError: for anything but (image, label) with floating-point images and integer labels.
    """
    batches: Iterable[Any]
    if isinstance(data, DataLoader):
        batches = _batches(data)
    elif isinstance(data, AnyImages):
        batches = DeviceLoader(data, 128, device=device, shuffle=True, seed=seed)
    elif isinstance(data, Dataset):
        shuffle = not isinstance(data, IterableDataset) and len(data) > 0  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        batches = DataLoader(data, 128, shuffle=shuffle, generator=generator, collate_fn=collated)
    else:
        raise DataError(f"Expected a torch Dataset or DataLoader, got {type(data).__name__}.")
    taken: list[tuple[Tensor, Tensor]] = []
    with undisturbed():
        for batch in batches:
            images, labels = checked_batch(batch)
            taken.append((images.to(device), labels.to(device).long()))
            if sum(len(rows) for _, rows in taken) >= count:
                break
    return taken


def _batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Those of a DataLoader; samples of which torch can make none are a DataError."""
    try:
        yield from loader
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError) as error:
        if loader.collate_fn is not default_collate:
            raise
        raise DataError(
            f"The DataLoader's samples do not make a batch ({first_line(error)}): images must be "
            f"tensors of one size, which ToTensor() and Resize() in the transforms see to."
        ) from error


@dataclass(frozen=True)
class Criterion:
    """`score`: (module, groups, seed, batches) -> scores; `needs_data`: whether it uses batches."""

    score: Callable[[nn.Module, ChannelGroups, int, Batches], Scores]
    needs_data: bool = False


def _from_weights(score: Callable[[nn.Module, ChannelGroups], Scores]) -> Criterion:
    return Criterion(lambda module, groups, _s, _b: score(module, groups))


def _from_data(score: Callable[[nn.Module, ChannelGroups, Batches], Scores]) -> Criterion:
    return Criterion(
        lambda module, groups, _s, batches: score(module, groups, batches), needs_data=True
    )


CRITERIA: dict[str, Criterion] = {
    "random": Criterion(lambda _m, groups, seed, _b: random_scores(groups, seed)),
    "l1": _from_weights(l1_scores),
    "l2": _from_weights(l2_scores),
    "fpgm": _from_weights(fpgm_scores),
    "bn_scale": _from_weights(bn_scale_scores),
    "synflow": _from_weights(synflow_scores),
    "taylor": _from_data(taylor_scores),
    "taylor_weight": _from_data(taylor_weight_scores),
    "fisher": _from_data(fisher_scores),
    "obd": _from_data(obd_scores),
    "snip": _from_data(snip_scores),
    "apoz": _from_data(apoz_scores),
    "reinforce": Criterion(reinforce_scores, needs_data=True),
}


def channel_scores(
    name: str, module: nn.Module, groups: ChannelGroups, seed: int, batches: Batches | None
) -> Scores:
    """The scores that criterion `name` gives every channel of every group.

    Raises:
        ZooError: for an unknown criterion, one that needs data when there is none, or scores that
            are not finite.
        DataError: for data whose images the network does not run on.
    """
    if name not in CRITERIA:
        raise unknown("criterion", name, CRITERIA)
    criterion = CRITERIA[name]
    if criterion.needs_data and batches is None:
        raise ZooError(f"The criterion {name!r} needs data: pass data=, a Dataset or DataLoader.")
    if criterion.needs_data:
        _check_images(module, batches or ())
    scores = criterion.score(module, groups, seed, batches or ())
    for group, own in zip(groups.names, scores, strict=True):
        if not all(map(math.isfinite, own)):
            cause = "the images or the weights" if criterion.needs_data else "the weights"
            raise ZooError(
                f"The criterion {name!r} gives scores of {group!r} that are not finite: {cause} "
                f"contain NaN or infinite numbers, or overflow."
            )
    return scores


def _check_images(module: nn.Module, batches: Batches) -> None:
    for images, _ in islice(batches, 1):
        try:
            with evaluating(module), torch.no_grad():
                module(images[:1].clone())  # which it may overwrite
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the network raises
            raise DataError(
                f"The network does not run on images of shape {tuple(images[:1].shape)}: "
                f"{first_line(error)}"
            ) from error
