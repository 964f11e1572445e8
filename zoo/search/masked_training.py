"""Training under random masks: one network whose weights work at many widths.

Each step masks the channels that a new random profile removes, so that the shared weights learn to
work at many widths (Yu & Huang, 2019, "Universally slimmable networks"). Recalibrated candidates of
a base network trained in this way are a fidelity of their own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo.data.datasets import ImageSet
from zoo.planning.solver import round_widths
from zoo.search.fidelities import recalibrate
from zoo.search.tasks import sample
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import kept_positions
from zoo.surgery.surgery import named_tensors
from zoo.training.finetuning import finetune
from zoo.training.recipes import Recipe

__all__ = ["train_under_masks"]


class RandomlyMasked(nn.Module):
    """`module`; in training mode every call masks random channels of every group.

    A call draws one keep ratio per group, uniformly in [`least`, 1], and random channels.
    """

    def __init__(
        self, module: nn.Module, groups: ChannelGroups, seed: int, least: float = 0.1
    ) -> None:
        super().__init__()
        self.module = module
        self._groups, self._least = groups, least
        self._generator = np.random.default_rng(seed)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return self.module(images)
        return functional_call(self.module, self._masked(), (images,))

    def _masked(self) -> dict[str, Tensor]:
        tensors = named_tensors(self.module)
        result: dict[str, Tensor] = {}
        for name, dims in kept_positions(self._groups, self._kept()).items():
            tensor = tensors.get(name)
            if not isinstance(tensor, nn.Parameter):
                continue
            result[name] = tensor
            for dim, index in dims.items():
                mask = torch.zeros(tensor.shape[dim], device=tensor.device)
                mask[torch.from_numpy(index)] = 1
                result[name] = result[name] * mask.view(-1, *[1] * (tensor.ndim - dim - 1))
        return result

    def _kept(self) -> dict[str, list[int]]:
        sizes = self._groups.sizes
        widths = round_widths(sizes, self._generator.uniform(self._least, 1, len(sizes)).tolist())
        return {
            group.name: self._generator.permutation(group.size)[:width].tolist()
            for group, width in zip(self._groups.groups, widths, strict=True)
        }


def train_under_masks(
    module: nn.Module, groups: ChannelGroups, train: ImageSet, recipe: Recipe, seed: int = 0
) -> None:
    """Train `module` in place under random masks; it ends with its last weights, in eval mode.

    Its batch-norm statistics then fit no single width: they are recalibrated for the dense network.

    Raises:
        KeyboardInterrupt: when the training was interrupted.
    """
    wrapper = RandomlyMasked(module, groups, seed)
    if finetune(
        wrapper, train, None, teacher=None, recipe=recipe, seed=seed, progress=False
    ).interrupted:
        raise KeyboardInterrupt
    recalibrate(module, module, sample(train, 2048))
