"""What more than one test file needs of networks, their tensors, plans and images."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from zoo.criteria.scores import channel_scores
from zoo.errors import FactorError
from zoo.models import build_model
from zoo.planning.policies import policy_solution
from zoo.spec.cost import cost_model
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan, make_plan
from zoo.surgery.surgery import named_tensors
from zoo.tracing import contract
from zoo.tracing.graph import channel_groups

__all__ = [
    "CPU",
    "Net",
    "Sorted",
    "macs_of",
    "noise",
    "planned",
    "randomised",
    "same_state",
    "same_tensors",
    "traced",
]

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


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    left, right = named_tensors(a), named_tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def macs_of(module: nn.Module, size: int | tuple[int, int], channels: int = 3) -> int:
    """What torch counts for one image of `size` pixels per side, or height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, channels, height, width))
    return counter.get_total_flops() // 2


class Net(nn.Module):
    """A stem of 8 channels and a head; the subclasses differ in what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(torch.relu(self.stem(x))).mean((2, 3)))


class Sorted(Dataset):
    """Labelled noise sorted by class, as an image folder is; notes the labels that are read."""

    def __init__(self, count: int = 64, side: int = 8, classes: int = 10) -> None:
        self.images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
        self.labels = (torch.arange(count) * classes // count).tolist()
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.seen.append(self.labels[index])
        return self.images[index], self.labels[index]


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
