"""The architectures of the zoo, by name.

A name is one of the literal table `ARCHITECTURES`, or `torchvision:<name>` or `timm:<name>`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from zoo.common.seeding import seeded
from zoo.common.sizes import Size, checked_size, resolution
from zoo.errors import CheckpointError, ZooError, integer, unknown
from zoo.models.cnet import CNet
from zoo.models.mobilenet import ProjectedMobileNetV2, small_stem_mobilenet_v2
from zoo.models.resnet import ResNet, Shortcut, small_stem_resnet
from zoo.models.stem import RGB, take_channels
from zoo.models.vgg import VGG

__all__ = [
    "ARCHITECTURES",
    "STORED",
    "Architecture",
    "architecture",
    "build_model",
    "parameter_count",
]


@dataclass(frozen=True)
class Architecture:
    """How to build one architecture, and the reference that its profiles are stated at.

    Attributes:
        name: what users write.
        build: (num_classes, image_size) -> module.
        build_for: (num_classes, channels) -> module, if the library can build it for images with
            other than three channels; else the convolution that reads the image is replaced.
        classifier: name of the dense layer, or 1x1 convolution, whose rows are the classes.
        num_classes: of the reference.
        image_size: of the reference, in pixels; images are 3 x image_size x image_size.
        flatten_stride: the total stride, if the classifier reads a flattened map.
        profiles_from: an architecture with the same modules, whose profiles this one uses if it has
            none; provisionally, because they were measured there.
        rescaled: whether that one's layers have other widths or other channel groups, so that keep
            ratios are carried over layer by layer and scaled to the factor; else its counts hold.
        auxiliary: prefixes of a checkpoint's tensor names that are ignored.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    classifier: str
    num_classes: int = 10
    image_size: int = 32
    flatten_stride: int | None = None
    profiles_from: str = ""
    rescaled: bool = False
    auxiliary: tuple[str, ...] = ()
    build_for: Callable[[int, int], nn.Module] | None = None

    def checked_size(self, image_size: object) -> Size:
        """`image_size` as a `Size` that this architecture takes.

        Raises:
            ZooError: if it is no size, or is oblong although the classifier reads a flattened map.
        """
        size = checked_size("image_size", image_size)
        if self.flatten_stride and not isinstance(size, int):
            raise ZooError(
                f"{self.name} takes square images alone, because its classifier sees a flattened "
                f"map; got {resolution(size)}."
            )
        return size

    def infer(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """(num_classes, image_size) of the checkpoint whose tensors have these `shapes`.

        Raises:
            CheckpointError: if the classifier is missing or cannot belong to this architecture.
        """
        key = f"{self.classifier}.weight"
        shape = shapes.get(key)
        if shape is None or (len(shape) != 2 and shape[2:] != (1, 1)):
            raise CheckpointError(
                f"The checkpoint has no classifier {key!r} of 2 dimensions, or of 4 as a 1x1 "
                f"convolution, which {self.name} needs (found: {shape})."
            )
        classes, features = shape[:2]
        if self.flatten_stride is None:
            return classes, self.image_size
        reference = dict(self.build(1, self.image_size).named_parameters())[key].shape[1]
        width = reference // (self.image_size // self.flatten_stride) ** 2
        side = round((features / width) ** 0.5)
        if side < 1 or width * side * side != features:
            raise CheckpointError(
                f"{key} has {features} input features, but {self.name} has {width} times a square "
                f"number at every image size."
            )
        return classes, side * self.flatten_stride


def _resnet(
    name: str,
    blocks: int,
    shortcut: Shortcut,
    widths: tuple[int, int, int] = (16, 32, 64),
    lender: str = "",
) -> Architecture:
    return Architecture(
        name,
        lambda classes, _: ResNet(classes, widths, blocks, shortcut),
        "fc",
        profiles_from=lender,
        rescaled=bool(lender),
    )


def _small_stem(name: str, member: str, maxpool: bool = False) -> Architecture:
    return Architecture(
        name,
        lambda classes, _: small_stem_resnet(member, classes, maxpool=maxpool),
        "fc",
        profiles_from=f"{member}-cifar" if maxpool else "",
    )


def _vgg16(name: str, classifier: str, hidden: int | None = None) -> Architecture:
    return Architecture(name, lambda classes, _: VGG(classes, hidden), classifier)


ARCHITECTURES: dict[str, Architecture] = {
    known.name: known
    for known in (
        Architecture("cnet", CNet, "fc", flatten_stride=8),
        _resnet("resnet20-16", 3, "B1", (16, 32, 128)),
        _resnet("resnet20-64", 3, "B1", (64, 128, 512), lender="resnet20-16"),
        _resnet("resnet20", 3, "A"),
        _resnet("resnet32", 5, "A"),
        _resnet("resnet44", 7, "A"),
        _resnet("resnet56", 9, "A"),
        _resnet("resnet110", 18, "A"),
        _resnet("resnet20-b", 3, "B", lender="resnet20"),
        _resnet("resnet32-b", 5, "B", lender="resnet32"),
        _resnet("resnet44-b", 7, "B", lender="resnet44"),
        _resnet("resnet56-b", 9, "B", lender="resnet56"),
        _resnet("resnet110-b", 18, "B", lender="resnet110"),
        _resnet("resnet20-b1", 3, "B1", lender="resnet20"),
        _resnet("resnet32-b1", 5, "B1", lender="resnet32"),
        _resnet("resnet44-b1", 7, "B1", lender="resnet44"),
        _resnet("resnet56-b1", 9, "B1", lender="resnet56"),
        _resnet("resnet110-b1", 18, "B1", lender="resnet110"),
        _small_stem("resnet18-cifar", "resnet18"),
        _small_stem("resnet50-cifar", "resnet50"),
        _small_stem("resnet18-cifar-maxpool", "resnet18", maxpool=True),
        _small_stem("resnet50-cifar-maxpool", "resnet50", maxpool=True),
        _vgg16("vgg16_bn-cifar", "classifier"),
        _vgg16("vgg16_bn-cifar-512", "classifier.6", 512),
        _vgg16("vgg16_bn-cifar-4096", "classifier.6", 4096),
        Architecture(
            "mobilenet_v2-cifar",
            lambda classes, _: small_stem_mobilenet_v2(classes),
            "classifier.1",
        ),
        Architecture(
            "mobilenet_v2-cifar-projected",
            lambda classes, _: ProjectedMobileNetV2(classes),
            "linear",
        ),
    )
}
"""The registered architectures, by name.

Names in brackets are GitHub owners of the same networks. `resnet<depth>` has He et al.'s
parameter-free shortcuts (option A: akamaster), `-b` projects where the shape changes (chenyaofo,
bearpaw), `-b1` also in the first stage, as in the source paper. The small-stem networks are those
of kuangliu, weiaicunzai and timm's users; `-maxpool` keeps the stem's pooling (huyvnphan), which
has no tensors and so does not show in a checkpoint. `vgg16_bn-cifar` has one dense layer
(kuangliu, bearpaw), the others two hidden ones of 512 (chenyaofo) or 4096 (weiaicunzai).
`mobilenet_v2-cifar` is chenyaofo's and huyvnphan's, `-projected` kuangliu's."""

TWINS = {
    "torchvision:resnet18": "resnet18-cifar",
    "torchvision:resnet50": "resnet50-cifar",
    "torchvision:vgg16_bn": "vgg16_bn-cifar-4096",
    "torchvision:mobilenet_v2": "mobilenet_v2-cifar",
    "timm:resnet18": "resnet18-cifar",
    "timm:resnet50": "resnet50-cifar",
}
"""`profiles_from` of standard-stem architectures: the one with the same channel groups and a stem
for 32 pixels."""


CLASSIFIERS = {
    "alexnet": "classifier.6",
    "convnext": "classifier.2",
    "densenet": "classifier",
    "efficientnet": "classifier.1",
    "maxvit": "classifier.5",
    "mnasnet": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3": "classifier.3",
    "squeezenet": "classifier.1",
    "swin": "head",
    "vgg": "classifier.6",
    "vit": "heads.head",
}
"""torchvision family -> its classifier, where that is not `fc`."""

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Prefixes of torchvision's auxiliary classifiers, used only in training: they are ignored."""

STORED = (
    "torchvision:resnet18",
    "torchvision:resnet34",
    "torchvision:resnet50",
    "torchvision:resnet101",
    "torchvision:vgg16_bn",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "torchvision:densenet121",
    "torchvision:efficientnet_b0",
    "timm:resnet18",
    "timm:resnet50",
    "timm:ecaresnet50d",
    "timm:ecaresnet101d",
    "timm:efficientnet_b1",
    "timm:efficientnet_b2",
    "timm:efficientnet_b3",
)
"""Library architectures whose channel groups are bundled, like those of `ARCHITECTURES`."""


def architecture(name: str) -> Architecture:
    """The `Architecture` called `name`.

    Raises:
        ZooError: for anything but a known name; the message gives the nearest one.
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
        options: dict[str, bool] = {}
        if member in ("googlenet", "inception_v3"):
            options = {"aux_logits": False, "init_weights": True, "transform_input": True}
        return Architecture(
            name,
            lambda classes, _: torchvision.models.get_model(
                member, weights=None, num_classes=classes, **options
            ),
            next((c for family, c in CLASSIFIERS.items() if member.startswith(family)), "fc"),
            auxiliary=AUXILIARY if options else (),
            num_classes=1000,
            image_size=224,
            profiles_from=TWINS.get(name, ""),
        )
    if source == "timm" and member:
        import timm

        if not timm.is_model(member):
            raise _unknown_member(source, member, timm.list_models())
        try:
            config = timm.get_pretrained_cfg(member, allow_unregistered=True)
        except RuntimeError:  # the tag after the dot names no weights
            raise _unknown_member(source, member, timm.list_pretrained()) from None
        return Architecture(
            name,
            lambda classes, _: timm.create_model(member, num_classes=classes),
            _first_classifier(config.classifier) if config else "fc",
            num_classes=1000,
            image_size=config.input_size[-1] if config else 224,
            profiles_from=TWINS.get(name.partition(".")[0], ""),  # a dot begins the weights' tag
            build_for=lambda classes, channels: timm.create_model(
                member, num_classes=classes, in_chans=channels
            ),
        )
    raise _unknown_name(name)


def _first_classifier(names: object) -> str:
    """The first classifier of a timm configuration, which has several for distillation."""
    if isinstance(names, tuple | list):
        return str(names[0])
    return names if isinstance(names, str) else "fc"


@functools.cache
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
    full += [known for known in [f"{name}-cifar"] if known in ARCHITECTURES]
    if full:
        return ZooError(f"Unknown architecture {name!r}: write {' or '.join(map(repr, full))}.")
    return unknown("architecture", name, [*ARCHITECTURES, "torchvision:<name>", "timm:<name>"])


def build_model(
    arch: str,
    num_classes: int,
    *,
    image_size: Size | None = None,
    in_channels: int = RGB,
    seed: int = 0,
) -> nn.Module:
    """A dense network of architecture `arch`, randomly initialised from `seed`, on the CPU.

    Args:
        arch: a name of `ARCHITECTURES`, `torchvision:<name>` or `timm:<name>`.
        num_classes: outputs of the classifier.
        image_size: pixels per side, or (height, width); it matters only to architectures that
            flatten a map (cnet), which take only squares.
        in_channels: channels of the images.
        seed: of the initial weights; the caller's random state is left alone.

    Raises:
        ZooError: for an unknown name, a bad number of classes, an impossible image size, or
            channels that the architecture cannot be built for.
    """
    classes = integer("num_classes", num_classes, 1)
    known = architecture(arch)
    asked = known.image_size if image_size is None else known.checked_size(image_size)
    size = asked if isinstance(asked, int) else known.image_size
    if known.flatten_stride and (size < known.flatten_stride or size % known.flatten_stride):
        raise ZooError(f"{arch} needs an image size divisible by {known.flatten_stride}: {size}.")
    with seeded(seed):
        if in_channels == RGB:
            return known.build(classes, size)
        try:
            if known.build_for is not None:
                return known.build_for(classes, in_channels)
            take_channels(module := known.build(classes, size), in_channels)
        except Exception as error:  # whatever the library raises
            raise ZooError(
                f"{arch} cannot be built for images of {in_channels} channels: {error}"
            ) from error
        return module


def parameter_count(network: nn.Module) -> int:
    """The number of elements in all parameters; tied parameters count once."""
    return sum(parameter.numel() for parameter in network.parameters())
