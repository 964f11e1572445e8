"""Residual networks for small images: a 3x3 stem, stages of basic blocks, one dense layer.

Keys are torchvision's (`conv1`, `bn1`, `layer1.0.conv1`, `layer1.0.downsample.0`, `fc`).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BasicBlock", "PaddedShortcut", "ResNet", "Shortcut", "small_stem_resnet"]

Shortcut = Literal["A", "B", "B1"]
"""How the first block of a stage adds its input to its output. Where the shape changes, option A
pads with zeros and option B projects (He et al., "Deep Residual Learning", section 3.3). B1 also
projects in the first stage, where the shape stays the same."""


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class PaddedShortcut(nn.Module):
    """Option A, without parameters: every `stride`-th pixel, and zeros for the new channels.

    Args:
        before, after: zero channels in front of and behind the input's.
        stride: in both directions.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = before, after, stride

    def forward(self, x: Tensor) -> Tensor:
        pixels = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(pixels, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which goes through `downsample` when it is given."""

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)


class ResNet(nn.Module):
    """Images (N, 3, H, W) to logits (N, num_classes); stages halve the resolution after the first.

    The source paper's ResNet-20 has the shortcuts "B1" (section 6.2 and Table 1), so that the
    stem and stage 1 can have different widths.

    Args:
        num_classes: outputs of the last dense layer.
        widths: channels of the three stages; the stem has the first stage's.
        blocks: basic blocks per stage; 6 · blocks + 2 layers in all.
        shortcut: of the first block of a stage.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        num_classes: int,
        widths: tuple[int, int, int],
        blocks: int = 3,
        shortcut: Shortcut = "B1",
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        in_channels = widths[0]
        for stage, channels in enumerate(widths, start=1):
            stride = 1 if stage == 1 else 2
            first = _shortcut(shortcut, in_channels, channels, stride)
            layers = [BasicBlock(in_channels, channels, stride, first)]
            layers += [BasicBlock(channels, channels) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            in_channels = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _shortcut(kind: Shortcut, in_channels: int, channels: int, stride: int) -> nn.Module | None:
    if kind != "B1" and (stride, in_channels) == (1, channels):
        return None
    if kind == "A":
        before = (channels - in_channels) // 2
        return PaddedShortcut(before, channels - in_channels - before, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
    )


def small_stem_resnet(member: str, num_classes: int, *, maxpool: bool = False) -> nn.Module:
    """torchvision's ResNet `member` with a 3x3 stem of stride 1, for images of about 32 pixels.

    Args:
        member: `resnet18`, `resnet50`, ...
        num_classes: outputs of the last dense layer.
        maxpool: leave the stem's max-pooling in.
    """
    import torchvision

    module = torchvision.models.get_model(member, weights=None, num_classes=num_classes)
    module.conv1 = conv3x3(3, module.bn1.num_features)
    nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not maxpool:
        module.maxpool = nn.Identity()
    return module
