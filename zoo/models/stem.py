"""Networks for images of another number of channels than three."""

from __future__ import annotations

from torch import nn

from zoo.errors import ZooError

__all__ = ["RGB", "take_channels"]

RGB = 3


def take_channels(module: nn.Module, channels: int) -> None:
    """Make a network of colour images one of images of so many `channels`, in place.

    The convolution that sees the images gets new random weights.

    Raises:
        ZooError: if there is not exactly one.
    """
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d) and (layer.in_channels, layer.groups) == (RGB, 1)
    ]
    if len(layers) != 1:
        raise ZooError(f"{len(layers)} of its convolutions take images of {RGB} channels.")
    (layer,) = layers
    outputs, _, *kernel = layer.weight.shape
    layer.in_channels = channels
    layer.weight = nn.Parameter(layer.weight.new_empty(outputs, channels, *kernel))
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
