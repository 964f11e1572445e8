"""VGG-16 with batch norm for small images: torchvision's features, and a smaller classifier."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["VGG"]


class VGG(nn.Module):
    """Images (N, 3, H, W), of 32 pixels or more, to logits (N, num_classes).

    Args:
        num_classes: outputs of the classifier.
        hidden: width of the classifier's two hidden layers; without them it is one dense layer.
    """

    def __init__(self, num_classes: int, hidden: int | None = None) -> None:
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier: nn.Module
        if hidden is None:
            self.classifier = nn.Linear(512, num_classes)
        else:
            self.classifier = nn.Sequential(
                nn.Linear(512, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, num_classes),
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
