"""The architectures of the zoo, by name.

A name is one of the literal table `ARCHITECTURES`, or `torchvision:<name>` or `timm:<name>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from zoo.errors import CheckpointError, ZooError, unknown
from zoo.models.cnet import CNet
from zoo.models.resnet import ResNet

__all__ = ["ARCHITECTURES", "Architecture", "architecture", "build_model"]


@dataclass(frozen=True)
class Architecture:
    """How to build one architecture, and the reference that its profiles are stated at.

    Attributes:
        name: what users write.
        build: (num_classes, image_size) -> module.
        classifier: name of the dense layer whose rows are the classes.
        num_classes: of the reference.
        image_size: of the reference, in pixels; images are 3 x image_size x image_size.
        flatten_stride: for architectures whose classifier sees a flattened map, the total stride.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    classifier: str
    num_classes: int = 10
    image_size: int = 32
    flatten_stride: int | None = None

    def infer(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """(num_classes, image_size) of the checkpoint whose tensors have these `shapes`.

        Raises:
            CheckpointError: if the classifier is missing or cannot belong to this architecture.
        """
        key = f"{self.classifier}.weight"
        shape = shapes.get(key)
        if shape is None or len(shape) != 2:
            raise CheckpointError(
                f"The checkpoint has no classifier {key!r} of two dimensions, which {self.name} "
                f"needs (found: {shape})."
            )
        classes, features = shape
        if self.flatten_stride is None:
            return classes, self.image_size
        reference = dict(self.build(1, self.image_size).named_parameters())[key].shape[1]
        width = reference // (self.image_size // self.flatten_stride) ** 2
        side = round((features / width) ** 0.5)
        if side < 1 or width * side * side != features:
            raise CheckpointError(
                f"{key} has {features} input features, which {self.name} has for no image size "
                f"({width} channels times a square)."
            )
        return classes, side * self.flatten_stride


def _resnet20(name: str, widths: tuple[int, int, int]) -> Architecture:
    return Architecture(name, lambda classes, _: ResNet(classes, widths), "fc")


ARCHITECTURES: dict[str, Architecture] = {
    "cnet": Architecture("cnet", CNet, "fc", flatten_stride=8),
    "resnet20-16": _resnet20("resnet20-16", (16, 32, 128)),
    "resnet20-64": _resnet20("resnet20-64", (64, 128, 512)),
}


def architecture(name: str) -> Architecture:
    """The `Architecture` called `name`.

    Raises:
        ZooError: for an unknown name, with the nearest known one.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    source, _, member = name.partition(":")
    if source == "torchvision" and member:
        import torchvision

        if member not in torchvision.models.list_models(module=torchvision.models):
            choices = torchvision.models.list_models(module=torchvision.models)
            raise unknown("torchvision architecture", member, choices)
        with torch.device("meta"):
            skeleton = torchvision.models.get_model(member, weights=None, num_classes=7)
        return Architecture(
            name,
            lambda classes, _: torchvision.models.get_model(
                member, weights=None, num_classes=classes
            ),
            _classifier_name(skeleton, 7),
            num_classes=1000,
            image_size=224,
        )
    if source == "timm" and member:
        import timm

        if not timm.is_model(member):
            near = timm.list_models(f"*{member[:6]}*")[:20]
            raise unknown("timm architecture", member, near)
        size = timm.get_pretrained_cfg(member, allow_unregistered=True)
        return Architecture(
            name,
            lambda classes, _: timm.create_model(member, num_classes=classes),
            size.classifier if size and isinstance(size.classifier, str) else "fc",
            num_classes=1000,
            image_size=size.input_size[-1] if size else 224,
        )
    raise unknown("architecture", name, [*ARCHITECTURES, "torchvision:<name>", "timm:<name>"])


def _classifier_name(module: nn.Module, num_classes: int) -> str:
    names = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == num_classes
    ]
    return names[-1] if names else "fc"


def build_model(
    arch: str, num_classes: int, *, image_size: int | None = None, seed: int = 0
) -> nn.Module:
    """A dense network of architecture `arch`, randomly initialised from `seed`, on the CPU.

    Args:
        arch: a name of `ARCHITECTURES`, `torchvision:<name>` or `timm:<name>`.
        num_classes: outputs of the classifier.
        image_size: pixels; only architectures that flatten a map (cnet) depend on it.
        seed: of the initial weights; the caller's random state is left alone.

    Raises:
        ZooError: for an unknown name, a bad number of classes or an impossible image size.
    """
    if num_classes < 1:
        raise ZooError(f"num_classes must be at least 1, got {num_classes}.")
    known = architecture(arch)
    size = image_size or known.image_size
    if known.flatten_stride and (size < known.flatten_stride or size % known.flatten_stride):
        raise ZooError(f"{arch} needs an image size divisible by {known.flatten_stride}: {size}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return known.build(num_classes, size)
