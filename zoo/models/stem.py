"""What a network takes: images with other than three channels, and images that it scales itself."""

from __future__ import annotations

from torch import nn

from zoo.errors import ZooError

__all__ = ["RGB", "take_channels", "transform_input", "transforms_input"]

RGB = 3


def take_channels(module: nn.Module, channels: int) -> None:
    """Change a network for RGB images to take images with `channels` channels, in place.

    The convolution that reads the images gets new random weights. Colours are scaled no more.

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
    transform_input(module, False)


def transforms_input(network: nn.Module) -> bool | None:
    """Whether a network of torchvision scales its images first; None if it is of no such kind.

    GoogLeNet and Inception v3 may turn ImageNet's means and deviations into halves, for which their
    own weights were trained. It is an attribute, which no tensor shows.
    """
    own = (getattr(layer, "transform_input", None) for layer in network.modules())
    return next((value for value in own if isinstance(value, bool)), None)


def transform_input(network: nn.Module, on: bool | None) -> None:
    """Make a network scale its images first or not, if it can, in place; None leaves it."""
    if on is not None and transforms_input(network) is not None:
        network.transform_input = on  # type: ignore[assignment]
