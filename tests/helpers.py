"""What more than one test file needs of networks, their tensors, plans and images."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor, nn

from zoo.criteria.scores import channel_scores
from zoo.errors import FactorError
from zoo.models import build_model
from zoo.planning.policies import policy_solution
from zoo.spec.cost import cost_model
from zoo.spec.groups import ChannelGroups
from zoo.spec.plan import Plan, make_plan
from zoo.surgery.surgery import named_tensors
from zoo.tracing import contract
from zoo.tracing.graph import channel_groups

__all__ = ["CPU", "noise", "planned", "randomised", "same_state", "traced"]

CPU = "CPUExecutionProvider"


def noise(count: int, size: int = 8, seed: int | None = None) -> Tensor:
    """Random images, others for every count unless there is a seed."""
    generator = torch.Generator().manual_seed(count if seed is None else seed)
    return torch.randn(count, 3, size, size, generator=generator)


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


@functools.cache
def traced(name: str) -> tuple[nn.Module, torch.Tensor, ChannelGroups]:
    """A double-precision network of five classes, all at random, images and its groups.

    None of them is to be changed.
    """
    module = build_model(name, 5)
    if name == "torchvision:vgg16_bn":  # its 120 million dense parameters prove nothing more
        module.classifier = nn.Sequential(nn.Linear(512 * 49, 64), nn.ReLU(), nn.Linear(64, 5))
    size = {"resnet20-16": 16, "resnet20-64": 8}.get(name, 32)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)).double()
    return contract.randomised(module), images, channel_groups(module, images[:1])


def planned(
    module: nn.Module,
    groups: ChannelGroups,
    policy: str = "equal",
    criterion: str = "random",
    cf: float = 3.0,
    seed: int = 3,
) -> Plan:
    """A plan at `cf`, or at the nearest factor that the policy reaches."""
    model = cost_model(groups)
    for factor in (cf, 2.0, 1.5, 1.2, 1.05):
        with contextlib.suppress(FactorError):
            solution = policy_solution(policy, model, factor, "params", seed)
            break
    images = torch.rand(8, 3, groups.image_size, groups.image_size).double()
    return make_plan(
        groups,
        dict(zip(groups.names, solution.widths, strict=True)),
        channel_scores(criterion, module, groups, seed, [(images, torch.arange(8) % 5)]),
        profile=policy,
        metric="params",
        asked=factor,
        criterion=criterion,
        seed=seed,
    )
