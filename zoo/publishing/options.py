"""The options of a publication; this module does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zoo.deployment.options import per_channel
from zoo.errors import ZooError, unknown

__all__ = ["FILES", "PublishOptions"]

FILES = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
}
"""Precision -> the file's place, as optimum and transformers.js name it."""


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """What a publication says and holds beside the network."""

    license: str | None = None
    """of the weights, as the Hub names it: mit, apache-2.0, cc-by-4.0, ..."""
    base_model: str | None = None
    """model of the Hub that the network was pruned from; by default that of its record"""
    datasets: tuple[str, ...] = ()
    """data sets of the Hub that it was trained on"""
    precisions: tuple[str, ...] | None = None
    """of the ONNX files: fp32, fp16, int8; by default all, int8 only with data"""
    mean: tuple[float, ...] | None = None
    """per channel, subtracted from images in [0, 1] to normalise them; by default the data's"""
    std: tuple[float, ...] | None = None
    """per channel, the divisor of that normalisation; by default the data's"""
    message: str | None = None
    """of the commit"""

    def __post_init__(self) -> None:
        for name in ("datasets", "precisions"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, (value,))
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, per_channel(name, getattr(self, name)))
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ZooError("mean= and std= belong together: one number of each per channel.")
        if not all(map(math.isfinite, self.mean or ())) or not all(
            math.isfinite(value) and value > 0 for value in self.std or ()
        ):
            raise ZooError(f"mean={self.mean}, std={self.std}: finite numbers, and std above 0.")
        for precision in self.precisions or ():
            if precision not in FILES:
                raise unknown("precision", precision, FILES)
