"""Small networks that have learnt something, so that their top classes mean something."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

import zoo
from zoo.data.datasets import ImageSet, Splits
from zoo.storage.artefacts import save_checkpoint

__all__ = ["SAMPLE", "TINY", "base_networks", "halves", "logits", "trained"]

SAMPLE = {
    "cnet": (8, 4, 0.02),
    "resnet20-16": (8, 4, 0.1),
    "torchvision:resnet18": (32, 4, 0.05),
    "torchvision:mobilenet_v2": (32, 10, 0.1),
}
"""Architecture -> pixels per side of its images, and the epochs and learning rate that suit it."""

TINY = ["--data", "digits", "--size", "8", "--epochs", "2", "--lr", "0.05"]
"""The flags of a training of seconds."""


@functools.cache
def halves(size: int) -> Splits:
    """Noise, one half and channel of which are brighter: six classes that are learnt fast."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        pixels = torch.randint(0, 160, (count, 3, size, size), generator=generator)
        labels = torch.arange(count) % 6
        for image, label in zip(pixels, labels.tolist(), strict=True):
            image[label % 3].tensor_split(2)[label // 3].add_(60)
        names = ("red", "green", "blue", "low red", "low green", "low blue")
        mean, std = (0.3, 0.35, 0.4), (0.2, 0.22, 0.24)
        return ImageSet("halves", pixels.to(torch.uint8), labels, names, mean, std, flip=False)

    return Splits(images(384), images(240), images(240))


@functools.cache
def trained(arch: str) -> tuple[nn.Module, Splits]:
    """A network pruned 2x that has learnt its classes, and the images."""
    size, epochs, lr = SAMPLE[arch]
    splits = halves(size)
    dense = zoo.create_model(arch, 6, image_size=size)
    model = zoo.load(arch, 2, dense, profile="equal", image_size=size)
    recipe = zoo.Recipe(epochs=epochs, batch_size=32, lr=lr)
    zoo.finetune(model, splits.train, splits.val, recipe=recipe)
    return model, splits


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def base_networks(folder: Path) -> tuple[str, ...]:
    """Two checkpoints of cnet for the digits."""
    splits = zoo.load_data("digits", size=8)
    paths = []
    for seed in range(2):
        module = zoo.create_model("cnet", 10, image_size=8, seed=seed)
        recipe = zoo.Recipe(epochs=6, lr=0.03, batch_size=64, augment=False)
        zoo.finetune(module, splits.train, splits.val, recipe=recipe, seed=seed, progress=False)
        paths.append(str(folder / f"base-{seed}.safetensors"))
        save_checkpoint(module, paths[-1], {"split_digest": splits.digest})
    return tuple(paths)
