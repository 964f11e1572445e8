"""The inputs that an exported file is compared on, their labels and their normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from zoo.data.images import AnyImages
from zoo.deployment.options import ExportOptions, per_channel
from zoo.deployment.parity import checked, gather, items
from zoo.errors import ExportError
from zoo.spec.groups import InputShape
from zoo.tracing.calls import Inputs, batch_of, example_of, mapped, shapes_of

__all__ = [
    "NOISE_IMAGES",
    "Normalisation",
    "Sample",
    "data_set_of",
    "folded",
    "normalisation_of",
    "sample_of",
]

PARITY_IMAGES = 256
NOISE_IMAGES = 16


Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std), per channel."""


@dataclass(frozen=True)
class Sample:
    """Inputs on the CPU to compare on, their labels and their origin.

    `calibration` are the inputs that set the ranges of int8 activations; for int8, others.
    """

    inputs: Inputs
    labels: Tensor | None
    origin: str
    calibration: Inputs

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of images; None for other inputs."""
        if isinstance(self.inputs, Tensor) and self.inputs.ndim == 4:
            return tuple(self.inputs.shape[1:])
        return None


def sample_of(
    inputs: Dataset[Any] | DataLoader[Any] | Inputs | None,
    example: Inputs | None,
    own: tuple[InputShape, ...],
    precision: str,
) -> Sample:
    """Items of `inputs`; without them noise of the shapes of `example`, or else of `own`."""
    int8 = precision.startswith("int8")
    if inputs is not None:
        found, labels = gather(inputs, PARITY_IMAGES * (2 if int8 else 1))
        found = checked("inputs", found)
        compared = slice(1, None, 2) if int8 else slice(None)
        if int8 and batch_of(found) < 2:
            raise ExportError(
                "int8 needs at least two images: one half sets the ranges of its activations, the "
                "other half is used for the comparison."
            )
        labels = None if labels is None else labels[compared]
        origin = inputs.name if isinstance(inputs, AnyImages) else "given"
        return Sample(items(found, compared), labels, origin, items(found, slice(0, None, 2)))
    if int8:
        raise ExportError("int8 needs inputs=: images that set the ranges of its activations.")
    shapes = own if example is None else shapes_of(checked("example_input", example))
    if not shapes:
        raise ExportError(
            "Exporting needs images: pass inputs= (a data set to compare on) or example_input= "
            "(a tensor of the shape the network takes)."
        )
    generator = torch.Generator().manual_seed(0)
    noise = example_of(shapes, NOISE_IMAGES, partial(torch.randn, generator=generator))
    noise = checked("example_input", noise)
    return Sample(noise, None, "noise", noise)


def normalisation_of(options: ExportOptions, inputs: Any, sample: Sample) -> Normalisation | None:
    """(mean, std) of the images, from the options or else the data set, or None."""
    given = options if options.mean or options.std else data_set_of(inputs)
    mean, std = (_own_channels(given, name) for name in ("mean", "std"))
    if mean is None or std is None:
        if options.fold or given is options:
            raise ExportError(
                "Normalisation needs both a mean and a std per channel: give both in "
                "ExportOptions, or pass inputs= that have them."
            )
        return None
    if sample.image_shape is None:
        if not options.fold and given is not options:  # as of a data set of signals
            return None
        raise ExportError("mean and std are for networks of one batch of images (N, C, H, W).")
    channels = sample.image_shape[0]
    finite = all(map(math.isfinite, (*mean, *std)))
    if len(mean) != channels or len(std) != channels or not min(std) > 0 or not finite:
        raise ExportError(
            f"mean={mean} and std={std} must be {channels} finite numbers each, one per channel, "
            f"and each std positive."
        )
    return mean, std


def _own_channels(given: Any, name: str) -> tuple[float, ...] | None:
    """The attribute `name` of `given`, if it is numbers in a tuple, a list or a flat array."""
    values = getattr(given, name, None)
    flat = isinstance(values, np.ndarray | Tensor) and values.ndim == 1
    sequence = flat or isinstance(values, tuple | list)
    return per_channel(name, values) if sequence else None  # type: ignore[arg-type]


def data_set_of(inputs: Any) -> Any:
    """The data set inside DataLoaders and Subsets, which may have a mean, a std and classes."""
    while hasattr(inputs, "dataset"):
        inputs = inputs.dataset
    return inputs


class _Folded(nn.Module):
    """A network that takes images in [0, 1] and normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def folded(
    network: nn.Module, sample: Sample, normalisation: Normalisation
) -> tuple[nn.Module, Sample]:
    """The network with its normalisation inside, and the sample's images without it."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in normalisation)
    inputs, calibration = (
        mapped(lambda images: images * std + mean, part)
        for part in (sample.inputs, sample.calibration)
    )
    folded = _Folded(network, mean, std).eval()
    return folded, replace(sample, inputs=inputs, calibration=calibration)
