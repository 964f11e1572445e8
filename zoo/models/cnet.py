"""C-NET of the source paper (section 6.1): six 3x3 convolutions of 32 channels, no batch norm."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["CNet"]


class CNet(nn.Module):
    """Images (N, 3, S, S) to logits (N, num_classes).

    ReLU after every convolution, 2x2 max-pooling after every second one, then flatten and one dense
    layer `fc`. The convolutions are `conv1` to `conv6`: six pruning decisions (the paper's Table 1
    prints nine; its text's six is right).

    Args:
        num_classes: outputs of the dense layer.
        image_size: S, a multiple of 8; it fixes the dense layer's input features, 32 · (S / 8)².
    """

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d
    conv4: nn.Conv2d
    conv5: nn.Conv2d
    conv6: nn.Conv2d

    def __init__(self, num_classes: int, image_size: int = 32, width: int = 32) -> None:
        super().__init__()
        in_channels = 3
        for n in range(1, 7):
            setattr(self, f"conv{n}", nn.Conv2d(in_channels, width, 3, padding=1))
            in_channels = width
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(width * (image_size // 8) ** 2, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv2(self.relu(self.conv1(x)))))
        x = self.pool(self.relu(self.conv4(self.relu(self.conv3(x)))))
        x = self.pool(self.relu(self.conv6(self.relu(self.conv5(x)))))
        return self.fc(x.flatten(1))
