"""What more than one test file needs of networks and their tensors."""

from __future__ import annotations

import torch
from torch import nn

from zoo.pruning.surgery import named_tensors

__all__ = ["randomised", "same_state"]


def randomised(module: nn.Module) -> nn.Module:
    """`module` with every parameter and buffer drawn at random, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    for tensor in named_tensors(module).values():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05
            tensor.data.copy_(noise)
    return module.eval()


def same_state(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)
