"""The architectures of the zoo, by name.

A name is one of the literal table `ARCHITECTURES`, or `torchvision:<name>` or `timm:<name>`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from zoo.errors import CheckpointError, ZooError, integer, unknown
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
        ZooError: for an unknown name, with the nearest known one; for anything but a name.
    """
    if not isinstance(name, str):
        raise ZooError(
            f"An architecture is a name, such as {next(iter(ARCHITECTURES))!r}; got {name!r}."
        )
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    source, _, member = name.partition(":")
    if source == "torchvision" and member:
        import torchvision

        if member not in _torchvision_names():
            raise _unknown_member(source, member, _torchvision_names())
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
            raise _unknown_member(source, member, timm.list_models())
        try:
            size = timm.get_pretrained_cfg(member, allow_unregistered=True)
        except RuntimeError:  # the part after a dot names no weights
            raise _unknown_member(source, member, timm.list_pretrained()) from None
        return Architecture(
            name,
            lambda classes, _: timm.create_model(member, num_classes=classes),
            size.classifier if size and isinstance(size.classifier, str) else "fc",
            num_classes=1000,
            image_size=size.input_size[-1] if size else 224,
        )
    raise _unknown_name(name)


def _torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _unknown_member(library: str, member: str, names: Iterable[str]) -> ZooError:
    """As `unknown`, for lists too long to print."""
    near = difflib.get_close_matches(member, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{library}:{near[0]}'? " if near else ""
    return ZooError(
        f"Unknown {library} architecture {member!r}. {hint}"
        f"{library}'s list_models() names them all."
    )


def _unknown_name(name: str) -> ZooError:
    import timm

    libraries = {"torchvision": _torchvision_names(), "timm": timm.list_models()}
    full = [f"{library}:{name}" for library, names in libraries.items() if name in names]
    if full:
        return ZooError(f"Unknown architecture {name!r}: write {' or '.join(map(repr, full))}.")
    return unknown("architecture", name, [*ARCHITECTURES, "torchvision:<name>", "timm:<name>"])


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
    classes = integer("num_classes", num_classes, 1)
    known = architecture(arch)
    size = known.image_size if image_size is None else integer("image_size", image_size, 1)
    if known.flatten_stride and (size < known.flatten_stride or size % known.flatten_stride):
        raise ZooError(f"{arch} needs an image size divisible by {known.flatten_stride}: {size}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return known.build(classes, size)
