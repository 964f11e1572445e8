"""Forward passes whose channels are hard to follow: structures inside, copies, regions, training.

Each is cut, held to the contract of surgery, saved, reloaded and trained, and nothing of it may
stay whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from odd import IMAGES, Build, Net, conv, cut, net, param
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import zoo
from zoo.errors import FactorError, GraphError
from zoo.tracing.contract import randomised, violation
from zoo.tracing.graph import analyse

MAPS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    """A module without children that gives what `run` makes of its input."""

    def __init__(self, run: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(x)


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


class Levels(nn.Module):
    """The levels of a feature pyramid on ResNet-18, classified by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
        )
        self.classes = conv(256, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.classes(level).flatten(2) for level in self.pyramid(x).values()], 2)


def parted(run: Callable[[Tensor], object], join: Callable[..., Tensor], out: int = 8) -> Build:
    return lambda: net(lambda n, x: join(n.part(x)), out, part=Part(run))


def unpooled(n: nn.Module, x: Tensor) -> Tensor:
    values, places = n.pool(x)
    return F.max_unpool2d(values, places, 2) + x


STRUCTURES: dict[str, Build] = {
    "a tuple": parted(lambda x: (x.relu(), x.sigmoid()), lambda r: r[0] + r[1]),
    "a list": parted(lambda x: [x, x.abs()], lambda r: torch.cat(r, 1), 16),
    "a dict": parted(lambda x: {"x": x, "y": -x}, lambda r: r["x"] * r["y"]),
    "a named tuple": parted(lambda x: Pair(x, x.exp()), lambda r: r.low + r.high),
    "nested": parted(lambda x: (x, [x.relu(), {"z": x.tanh()}]), lambda r: r[1][1]["z"] + r[0]),
    "beside no tensor": parted(lambda x: (x.relu(), None, "text"), lambda r: r[0]),
    "values of a pooling": lambda: net(
        lambda n, x: n.pool(x)[0], pool=nn.MaxPool2d(2, return_indices=True)
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_modules_that_return_several_tensors(name: str, tmp_path: Path) -> None:
    assert list(cut(STRUCTURES[name], tmp_path).pruning.plan.kept) == ["a", "b"]


def test_a_feature_pyramid_of_torchvision(tmp_path: Path) -> None:
    assert not cut(Levels, tmp_path, MAPS).pruning.plan.unprunable


def test_what_undoes_a_pooling_sees_the_places_that_it_gave(tmp_path: Path) -> None:
    build: Build = lambda: net(unpooled, pool=nn.MaxPool2d(2, return_indices=True))  # noqa: E731
    assert list(cut(build, tmp_path).pruning.plan.kept) == ["a", "b"]


# --- copies ---------------------------------------------------------------------------------------


def context(spread: Callable[[Tensor, Tensor], Tensor], layer: Callable[[], nn.Module]) -> Build:
    """What is pooled from the whole map, spread over it again, goes through a layer."""
    return lambda: net(
        lambda n, x: x + n.layer(spread(x.mean((2, 3), keepdim=True), x)), layer=layer()
    )


def frames(n: nn.Module, x: Tensor) -> Tensor:
    """A still picture as the four frames of a film."""
    film = n.a(x.unsqueeze(2).expand(-1, -1, 4, -1, -1)).relu()
    return n.head(n.b(film).relu().mean((2, 3, 4)))


COPIES: dict[str, Build] = {
    "expanded, a convolution": context(lambda m, x: m.expand_as(x), lambda: conv(8, 8, 1)),
    "repeated, a norm": context(
        lambda m, x: m.repeat(1, 1, *x.shape[2:]), lambda: nn.BatchNorm2d(8)
    ),
    "resized, a convolution": context(
        lambda m, x: F.interpolate(m, x.shape[2:]), lambda: conv(8, 8)
    ),
    "broadcast by zeros": context(lambda m, x: m + torch.zeros(x.shape[2:]), lambda: conv(8, 8)),
    "frames": lambda: Net(
        frames, a=nn.Conv3d(3, 8, 3, padding=1), b=nn.Conv3d(8, 8, 3, padding=1),
        head=nn.Linear(8, 4),
    ),
    "a parameter per channel": lambda: net(
        lambda n, x: n.layer(n.row.view(1, -1, 1, 1).expand_as(x) + x),
        row=param(8), layer=conv(8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_copies_that_enter_a_layer(name: str, tmp_path: Path) -> None:
    plan = cut(COPIES[name], tmp_path).pruning.plan
    assert {"a", "b"} <= plan.kept.keys()
    assert not plan.unprunable


def test_grey_copied_to_colours(tmp_path: Path) -> None:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        return n.head(n.a(n.act(x.expand(-1, 3, -1, -1))).mean((2, 3)))

    build: Build = lambda: Net(run, act=nn.ReLU(), a=conv(3, 8), head=nn.Linear(8, 4))  # noqa: E731
    assert list(cut(build, tmp_path, IMAGES[:, :1]).pruning.plan.kept) == ["a"]


# --- regions --------------------------------------------------------------------------------------


def frozen(n: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        mean = n.gate(x.mean((2, 3), keepdim=True)).sigmoid()
    return x * mean


def full(n: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return n.gate(x).relu()


def nested(n: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().mean((2, 3), keepdim=True)
        with torch.enable_grad():
            inner = n.gate(x)
    return inner * scale


REGIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "detached": lambda n, x: x * n.gate(x).detach().sigmoid(),
    "autocast switched off": full,
    "gradients within none": nested,
    "recomputed": lambda n, x: checkpoint(lambda y: n.gate(y).relu(), x, use_reentrant=False),
    "no gradients": frozen,
}


@pytest.mark.parametrize("name", REGIONS)
def test_regions_with_gradients_or_precision_switched(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        trains = name not in ("detached", "no gradients")
        return net(REGIONS[name], gate=conv(8, 8, 1).requires_grad_(trains))

    plan = cut(build, tmp_path).pruning.plan
    assert not plan.unprunable
    assert {"a", "b"} <= plan.kept.keys()


# --- what only training runs ----------------------------------------------------------------------


def trained(run: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> Net:
    """As `net`, with `run` beside it in training mode."""

    def forward(n: nn.Module, x: Tensor) -> Tensor:
        maps = n.a(x).relu()
        logits = n.head(n.b(maps).mean((2, 3)))
        return logits + run(n, maps) if n.training else logits

    return Net(forward, a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 4), **parts)


@pytest.mark.parametrize(
    "auxiliary",
    [
        lambda: trained(lambda n, x: n.aux(x.mean((2, 3))), aux=nn.Linear(8, 4)),
        lambda: trained(lambda n, x: n.aux(x).mean((2, 3)), aux=conv(8, 4)),
        lambda: trained(lambda n, x: n.aux(x).flatten(1)[:, :4], aux=nn.Conv2d(8, 4, 15)),
        lambda: trained(lambda n, x: (x * n.aux).mean((2, 3))[:, :1], aux=param(8, 1, 1)),
    ],
    ids=["a linear layer", "a convolution", "one of larger maps", "a parameter"],
)
def test_a_head_that_only_training_has_is_named(auxiliary: Build) -> None:
    with pytest.raises(
        GraphError, match=r"'aux(\.weight)?' is not used in eval mode, and surgery would"
    ):
        zoo.prune(auxiliary(), IMAGES, cf=2)


@pytest.mark.parametrize(
    "net",
    [
        lambda: trained(
            lambda n, x: (x * n.mask).mean((1, 2, 3))[:, None], mask=nn.Buffer(torch.ones(8, 1, 1))
        ),
        lambda: trained(lambda _, x: (x * torch.ones(8, 1, 1)).mean((1, 2, 3))[:, None]),
        lambda: trained(lambda _, x: x.view(4, 8, 8, 8).mean((1, 2, 3))[:, None]),
    ],
    ids=["a buffer", "a constant mask", "a constant view"],
)
def test_what_only_training_does_without_parameters_is_seen_too(net: Build) -> None:
    with pytest.raises(GraphError, match="Eval mode works, but surgery would break"):
        zoo.prune(net(), IMAGES, cf=2)


@pytest.mark.parametrize(
    "auxiliary",
    [
        lambda: trained(lambda n, x: n.aux(x.mean((1, 2, 3))[:, None]), aux=nn.Linear(1, 4)),
        lambda: trained(lambda n, x: n.aux * x.mean(), aux=param(1)),
        lambda: trained(lambda _, x: F.dropout2d(x, 0.5).mean()),
    ],
    ids=["of the mean", "a scale", "dropout"],
)
def test_what_training_adds_without_channels_is_kept(auxiliary: Build) -> None:
    pruned = zoo.prune(auxiliary(), IMAGES, cf=2)
    outputs = pruned.train()(IMAGES)
    outputs.sum().backward()
    assert outputs.shape == (2, 4)
    assert all(p.grad is not None for p in pruned.parameters())


# --- widths that say how much ---------------------------------------------------------------------


def padded(n: nn.Module, x: Tensor) -> Tensor:
    """The shortcut of a ResNet without parameters, whose padding is read from the tensors."""
    small, large = n.a(x), n.c(n.a(x))
    missing = large.shape[1] - small.shape[1]
    sides = (0, 0, 0, 0, missing // 2, missing - missing // 2)
    return n.head(n.b(large + F.pad(small, sides)).mean((2, 3)))


def quarter(n: nn.Module, x: Tensor) -> Tensor:
    count = x.shape[1] // 4
    return torch.cat([n.c(x[:, :count]), x[:, count:]], 1)


@pytest.mark.parametrize("cf", [1.2, 1.5, 2.0, 2.5, 3.0])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Net(padded, a=conv(3, 24), c=conv(24, 40), b=conv(40, 30), head=nn.Linear(30, 4)),
        lambda: net(quarter, c=conv(2, 2)),
        lambda: net(lambda _, x: x * min(x.shape[1], 3)),
        lambda: net(lambda _, x: x.tanh() if x.shape[1] > 3 else x),
        lambda: net(lambda _, x: x / torch.tensor(x.shape[1:]).prod()),
        lambda: net(lambda _, x: x * torch.tensor(x.shape[1] ** -0.5)),
        lambda: net(lambda _, x: x * np.float32(x.shape[1] ** -0.5)),
    ],
    ids=["padding", "quarter", "at most", "more than", "sizes", "a tensor", "of NumPy"],
)
def test_what_a_width_decides_is_right_at_every_factor(build: Build, cf: float) -> None:
    """Held to the contract, or out of reach with a reason; never a fault."""
    dense = randomised(build())
    with contextlib.suppress(FactorError):
        plan = zoo.prune(dense, IMAGES.double(), cf=cf).pruning.plan
        assert plan.got > 1.1
        assert violation(dense, *analyse(dense, IMAGES.double()), plan, IMAGES.double()) < 1e-9


# --- nothing is left ------------------------------------------------------------------------------


def halved(x: Tensor) -> Tensor:
    first, second = torch.split(x, [4, 4], 1)
    return torch.cat([first + second, first * second], 1)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda n, x: n.head(n.a(x).reshape(2, 512)), "its width 512 is a constant at node 'resh"),
        (lambda n, x: n.head(halved(n.a(x)).flatten(1)), "its width 4 is a constant at node 'sp"),
        (
            lambda n, x: n.head(n.a(x).softmax(1).flatten(1)),
            r"'a' \(is normalised over by",
        ),
        (lambda n, x: n.head(n.a(x).roll(1, 1).flatten(1)), r"'a' \(is rolled by a number of pos"),
    ],
    ids=["a flat view", "a split", "softmax", "roll"],
)
def test_where_all_stays_whole_the_reason_and_the_line_are_said(
    run: Callable[[nn.Module, Tensor], Tensor], reason: str
) -> None:
    net = Net(run, a=conv(3, 8), head=nn.Linear(512, 4))
    with pytest.raises(
        GraphError, match=rf"no channel group that can be pruned\. Not pruned: .*{reason}"
    ) as said:
        zoo.prune(net, IMAGES, cf=2)
    assert ", in forward" in str(said.value)


def test_a_depthwise_convolution_of_one_channel_is_no_other_computation() -> None:
    """Sliced channels are traced again with few: a program leaves groups of 1 out, as a default."""

    def halves(n: nn.Module, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return n.r(n.q(n.p(x[:, :half] + x[:, half:])))

    deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    module = net(halves, p=conv(4, 4), q=deep, r=conv(4, 8))
    assert not analyse(module, IMAGES)[1].unprunable
