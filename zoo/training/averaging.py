"""The exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

__all__ = ["WeightAverage"]


class WeightAverage(ModelEmaV3):
    """timm's ModelEmaV3, but the modules are walked through once, not at every update."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay, use_warmup=True)
        pairs = zip(_places(self.module), _places(model), strict=True)
        # by identity: a tied weight is held by several modules, and must be updated once
        self._places = list({id(mine[name]): ((mine, name), theirs)
                             for (mine, name), theirs in pairs}.values())  # fmt: skip

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        del model
        pairs = [(mine[name], theirs[name]) for (mine, name), (theirs, _) in self._places]
        averages, values = zip(*(p for p in pairs if p[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(averages, values, weight=1 - decay)
        counts = [p for p in pairs if not p[0].is_floating_point()]
        if counts:
            copies, originals = zip(*counts, strict=True)
            torch._foreach_copy_(copies, originals)


def _places(network: nn.Module) -> list[tuple[Mapping[str, Any], str]]:
    """The dict and key of each tensor of the state dict: DDP, for one, replaces buffers in them."""
    return [
        (held, name)
        for module in network.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    ]
