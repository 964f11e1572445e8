"""Renames the keys of widespread public implementations to those of this zoo.

Renaming is for networks that compute the same function. One that computes something else is a
separate architecture, or fits none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

__all__ = ["ADAPTERS", "adapted_names"]


def _staged(*depths: int) -> Iterator[tuple[str, str]]:
    """Rules that number blocks within stages of `depths` blocks, as timm does."""
    places = [f"{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    return ((rf"^_blocks\.{number}\.", f"blocks.{place}.") for number, place in enumerate(places))


ADAPTERS: dict[str, tuple[tuple[str, str], ...]] = {
    "akamaster/pytorch_resnet_cifar10, kuangliu/pytorch-cifar": (
        (r"^linear\.", "fc."),
        (r"\.shortcut\.", ".downsample."),
    ),
    "weiaicunzai/pytorch-cifar100": (
        (r"^conv1\.0\.", "conv1."),
        (r"^conv1\.1\.", "bn1."),
        (r"^conv2_x\.", "layer1."),
        (r"^conv3_x\.", "layer2."),
        (r"^conv4_x\.", "layer3."),
        (r"^conv5_x\.", "layer4."),
        (r"\.residual_function\.0\.", ".conv1."),
        (r"\.residual_function\.1\.", ".bn1."),
        (r"\.residual_function\.3\.", ".conv2."),
        (r"\.residual_function\.4\.", ".bn2."),
        (r"\.residual_function\.6\.", ".conv3."),
        (r"\.residual_function\.7\.", ".bn3."),
        (r"\.shortcut\.", ".downsample."),
        (r"^classifier\.5\.", "classifier.6."),
    ),
    "chengyangfu/pytorch-vgg-cifar10": (
        (r"^features\.module\.", "features."),
        (r"^classifier\.1\.", "classifier.0."),
        (r"^classifier\.4\.", "classifier.3."),
    ),
    "pytorch/vision, its files of DenseNet weights": (
        (r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),
    ),
    "lukemelas/EfficientNet-PyTorch, ml-illustrated/efficientnet_lite0": (
        (r"^_fc\.", "classifier."),
        (r"^_conv_(stem|head)\.", r"conv_\1."),
        (r"^_bn1\.", "bn2."),
        (r"^_bn0\.", "bn1."),
        (r"\._bn2\.", ".bn3."),
        (r"\._bn1\.", ".bn2."),
        (r"\._bn0\.", ".bn1."),
        (r"\._expand_conv\.", ".conv_pw."),
        (r"\._depthwise_conv\.", ".conv_dw."),
        (r"\._project_conv\.", ".conv_pwl."),
        (r"\._se_(reduce|expand)\.", r".se.conv_\1."),
        (r"^_blocks\.0\.conv_pwl\.", "_blocks.0.conv_pw."),
        (r"^_blocks\.0\.bn2\.", "_blocks.0.bn1."),
        (r"^_blocks\.0\.bn3\.", "_blocks.0.bn2."),
        *_staged(1, 2, 2, 3, 3, 4, 1),
    ),
}
"""Public repository -> pairs (regular expression, replacement), applied in order.

Repositories that need none: chenyaofo/pytorch-cifar-models, huyvnphan/PyTorch_CIFAR10,
bearpaw/pytorch-classification, and timm's or torchvision's networks with a smaller stem."""


def adapted_names(names: Iterable[str]) -> list[tuple[str, dict[str, str]]]:
    """(adapter, stored name -> zoo's name) for each way to read `names`; unchanged comes first.

    Adapters that would change nothing, or give two tensors one name, are left out.
    """
    own = list(names)
    readings = [("", {name: name for name in own})]
    for adapter, rules in ADAPTERS.items():
        renamed = {name: _renamed(name, rules) for name in own}
        if renamed != readings[0][1] and len(set(renamed.values())) == len(own):
            readings.append((adapter, renamed))
    return readings


def _renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
