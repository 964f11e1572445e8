"""Networks for images with other than three channels."""

from __future__ import annotations

from torch import nn

from zoo.errors import ZooError

__all__ = ["RGB", "take_channels"]

RGB = 3


def take_channels(module: nn.Module, channels: int) -> None:
    """Change a network for RGB images to take images with `channels` channels, in place.

    The convolution that reads the images gets new random weights.

    Raises:
        ZooError: unless exactly one convolution takes three channels.
    """
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d) and (layer.in_channels, layer.groups) == (RGB, 1)
    ]
    if len(layers) != 1:
        raise ZooError(f"Exactly one convolution must take {RGB} channels, but {len(layers)} do.")
    (layer,) = layers
    outputs, _, *kernel = layer.weight.shape
    layer.in_channels = channels
    layer.weight = nn.Parameter(layer.weight.new_empty(outputs, channels, *kernel))
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
