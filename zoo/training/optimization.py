"""The optimiser, its learning rate schedule, and the distillation loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ZooError
from zoo.training.recipes import Recipe

__all__ = ["distillation", "make_optimizer", "warmup_cosine"]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; weight decay on tensors of two dimensions or more.

    Raises:
        ZooError: when no parameter of `model` requires gradients.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    if not matrices and not vectors:
        raise ZooError(f"Nothing in this {type(model).__name__} can be trained: all is frozen.")
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    momentum = recipe.momentum
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=momentum, nesterov=momentum > 0)


def warmup_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    """Step -> factor of the learning rate: linear up to 1 in `warmup` steps, then a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return factor


def distillation(logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """τ² · KL divergence of the softened classes (Hinton et al., 2015), the mean over the batch."""
    student = functional.log_softmax(logits.float() / temperature, dim=1)
    wanted = functional.log_softmax(target / temperature, dim=1)
    divergence = functional.kl_div(student, wanted, reduction="batchmean", log_target=True)
    return divergence * temperature**2
