"""MobileNetV2 for small images: strides of 1 in the stem and in the stage of 24 channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ProjectedMobileNetV2", "small_stem_mobilenet_v2"]

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and stride of each stage."""


def small_stem_mobilenet_v2(num_classes: int) -> nn.Module:
    """torchvision's MobileNetV2 with the strides of `STAGES` and a stem of stride 1."""
    from torchvision.models import MobileNetV2

    module = MobileNetV2(num_classes, inverted_residual_setting=[list(row) for row in STAGES])
    module.features[0][0].stride = (1, 1)
    return module


class ProjectedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; a shortcut wherever the stride is 1."""

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if stride == 1 and in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class ProjectedMobileNetV2(nn.Module):
    """Images (N, 3, H, W) to logits (N, num_classes): the MobileNetV2 of kuangliu/pytorch-cifar.

    It differs from torchvision's in three ways that change what it computes: ReLU instead of ReLU6,
    an expansion in the first block too, and 1x1 projections on the shortcuts that change the width.
    The keys are that repository's.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        layers, in_channels = [], 32
        for expansion, channels, blocks, stride in STAGES:
            for block in range(blocks):
                stride = stride if block == 0 else 1
                layers.append(ProjectedResidual(in_channels, channels, expansion, stride))
                in_channels = channels
        self.layers = nn.Sequential(*layers)
        self.conv2 = nn.Conv2d(in_channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(torch.relu(self.bn1(self.conv1(x))))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.linear(self.avgpool(x).flatten(1))
