"""RandAugment on batches: each operation once, on all the images that drew it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from zoo.data.images import sent

__all__ = ["KINDS", "PER_IMAGE", "rand_augmented"]

STRENGTHS = 31
"""Number of magnitudes: 0 to 30."""


def _shifted(images: Tensor, right: float = 0, down: float = 0) -> Tensor:
    shifted: Tensor = functional.affine(images, 0.0, [int(right), int(down)], 1.0, [0.0, 0.0])
    return shifted


def _sheared(images: Tensor, right: float = 0, down: float = 0) -> Tensor:
    shear = [math.degrees(math.atan(right)), math.degrees(math.atan(down))]
    sheared: Tensor = functional.affine(images, 0.0, [0, 0], 1.0, shear, center=[0.0, 0.0])
    return sheared


_FARTHEST = 150 / 331
"""Largest translation, as a share of the image's side."""

OPERATIONS: dict[str, tuple[float, Callable[[Tensor, float], Tensor]]] = {
    "Identity": (0, lambda images, _: images),
    "ShearX": (0.3, lambda images, by: _sheared(images, right=by)),
    "ShearY": (0.3, lambda images, by: _sheared(images, down=by)),
    "TranslateX": (_FARTHEST, lambda images, by: _shifted(images, right=by * images.shape[-1])),
    "TranslateY": (_FARTHEST, lambda images, by: _shifted(images, down=by * images.shape[-2])),
    "Rotate": (30, functional.rotate),
    "Brightness": (0.9, lambda images, by: functional.adjust_brightness(images, 1 + by)),
    "Color": (0.9, lambda images, by: functional.adjust_saturation(images, 1 + by)),
    "Contrast": (0.9, lambda images, by: functional.adjust_contrast(images, 1 + by)),
    "Sharpness": (0.9, lambda images, by: functional.adjust_sharpness(images, 1 + by)),
    "Posterize": (4, lambda images, by: functional.posterize(images, round(8 - abs(by)))),
    "Solarize": (1, lambda images, by: functional.solarize(images, 255 * (1 - abs(by)))),
    "AutoContrast": (0, lambda images, _: functional.autocontrast(images)),
    "Equalize": (0, lambda images, _: functional.equalize(images)),
}
"""Name -> (strength at full magnitude, operation), both as in torchvision."""

KINDS = 2 * len(OPERATIONS)
"""Number of different draws: each operation with either sign."""

PER_IMAGE = 2
"""Operations per image."""


def rand_augmented(images: Tensor, magnitude: int, draws: Tensor) -> Tensor:
    """Uint8 images (N, 3, H, W), each changed by the operations that it drew, one after the other.

    Args:
        magnitude: from 0 to 30.
        draws: integers below `KINDS`, (N, `PER_IMAGE`), on the CPU.
    """
    operations = list(OPERATIONS.values())
    for column in draws.T:
        kinds, places = column.sort(stable=True)
        drawn, counts = kinds.unique_consecutive(return_counts=True)
        order = sent(places, images.device)
        changed = []
        for kind, part in zip(drawn.tolist(), images[order].split(counts.tolist()), strict=True):
            strongest, operation = operations[kind // 2]
            strength = torch.linspace(0, strongest, STRENGTHS)[magnitude].item()
            changed.append(operation(part, -strength if kind % 2 else strength))
        images = torch.empty_like(images).index_copy_(0, order, torch.cat(changed))
    return images
