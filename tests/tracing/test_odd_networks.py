"""Networks as people write them, pruned right; test_odd_refusals.py has what stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import macs_of
from odd import IMAGES, Build, Net, attention, conv, cut, halves, net, param
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.errors import GraphError, ZooError
from zoo.spec.cost import cost_model
from zoo.spec.profile import Profile, Reference
from zoo.tracing.contract import randomised, violation
from zoo.tracing.graph import analyse, channel_groups

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def tied_weights() -> nn.Module:
    module = net(lambda n, x: n.d(n.c(x).relu()), c=conv(8, 8), d=conv(8, 8))
    module.d.weight = module.c.weight
    return module


def two_names() -> nn.Module:
    module = net(lambda n, x: n.c(x) + n.pos, c=conv(8, 6), pos=param(6, 1, 1), out=6)
    module.alias, module.same = module.pos, module.c
    return module


def cbam(n: nn.Module, x: Tensor) -> Tensor:
    maps = [x.mean(1, keepdim=True), torch.max(x, 1, keepdim=True)[0]]
    return x * n.c(torch.cat(maps, 1)).sigmoid()


def tokens(n: nn.Module, x: Tensor) -> Tensor:
    rows = n.a(x).relu().flatten(2).transpose(1, 2) + n.pos
    return n.head(n.mix(rows).mean(1))


class Normalised(nn.Module):
    """The data's mean and deviation as buffers, per colour."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


# --- right ----------------------------------------------------------------------------------------

RIGHT: dict[str, tuple[Build, str]] = {
    # the same tensor or module more than once
    "tied convolutions": (tied_weights, "a b"),
    "two names": (two_names, "a c b"),
    "transposed alone": (
        lambda: net(lambda n, x: n.c(x), c=nn.ConvTranspose2d(8, 8, 2, 2)), "a c b",
    ),
    "a module called twice": (lambda: net(lambda n, x: n.c(n.c(x).relu()), c=conv(8, 8)), "a b"),
    "at two resolutions": (
        lambda: net(
            lambda n, x: n.c(x) + F.interpolate(n.c(F.max_pool2d(x, 2)), scale_factor=2.0),
            c=conv(8, 8),
        ),
        "a c b",
    ),
    "cat and add": (
        lambda: net(
            lambda n, x: torch.cat([x + n.c(x), n.d(x)], 1), 16, c=conv(8, 8), d=conv(8, 8)
        ),
        "a d b",
    ),
    # groups of convolutions and norms
    **{
        f"{groups} groups": (
            lambda groups=groups: net(lambda n, x: n.c(x), c=conv(8, 8, groups=groups)),
            "a b" if groups == 8 else "a c b",
        )
        for groups in (2, 4, 8)
    },
    "channel multiplier": (lambda: net(lambda n, x: n.c(x), 16, c=conv(8, 16, groups=8)), "a b"),
    "group norm": (lambda: net(lambda n, x: n.c(x), c=nn.GroupNorm(2, 8)), "a b"),
    "instance norm": (lambda: net(lambda n, x: n.c(x), c=nn.InstanceNorm2d(8)), "a b"),
    "PReLU per channel": (lambda: net(lambda n, x: n.c(x), c=nn.PReLU(8)), "a b"),
    # shapes of other tensors
    "a product as the tensor that entered it": (
        lambda: net(
            lambda n, x: (x.flatten(2).transpose(1, 2) @ n.w).transpose(1, 2).view_as(x),
            w=param(8, 8),
        ),
        "a b",
    ),
    "one layer's output as another's": (
        lambda: net(
            lambda n, x: n.c(x).flatten(1).reshape_as(n.d(x)) + n.d(x).mean(1, True),
            c=conv(8, 6), d=conv(8, 6), out=6,
        ),
        "a c b",
    ),
    # channels that move
    "channel shuffle": (
        lambda: net(
            lambda n, x: n.d(n.c(x)), d=conv(8, 8, groups=2), c=nn.ChannelShuffle(2)
        ),
        "a d b",
    ),
    "shuffle by views": (
        lambda: net(
            lambda _, x: x.view(-1, 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        ),
        "a b",
    ),
    "pixel shuffle": (lambda: net(lambda _, x: F.pixel_shuffle(x, 2), 2), "a b"),
    "pixel unshuffle": (lambda: net(lambda _, x: F.pixel_unshuffle(x, 2), 32), "a b"),
    "unfold and fold": (
        lambda: net(lambda _, x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1)),
        "a b",
    ),
    "flip": (lambda: net(lambda _, x: x.flip(1)), "a b"),
    "every second": (lambda: net(lambda _, x: x[:, ::2], 4), "a b"),
    "even and odd": (lambda: net(lambda _, x: torch.cat([x[:, 1::2], x[:, ::2]], 1)), "a b"),
    "repeat": (lambda: net(lambda _, x: x.repeat(1, 2, 1, 1), 16), "a b"),
    "repeat_interleave": (lambda: net(lambda _, x: x.repeat_interleave(2, 1), 16), "a b"),
    "glu": (lambda: net(lambda _, x: F.glu(x, 1), 4), "a b"),
    "movedim": (lambda: net(lambda _, x: x.movedim(1, -1).sigmoid().movedim(-1, 1)), "a b"),
    "a batch's own reshape": (lambda: net(lambda _, x: x.reshape(2, -1).view(x.shape)), "a b"),
    # channels that are reduced over, masked, weighed
    "CBAM": (lambda: net(cbam, c=conv(2, 1, 7)), "a b"),
    "ECA": (
        lambda: net(
            lambda n, x: x * n.c(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None].sigmoid(),
            c=nn.Conv1d(1, 1, 3, padding=1),
        ),
        "a b",
    ),
    **{
        f"{kind.__name__} along channels": (
            lambda kind=kind: net(lambda n, x: n.c(x[:, None])[:, 0], c=kind(1, 1, 3, padding=1)),
            "a b",
        )
        for kind in (nn.Conv3d, nn.ConvTranspose3d)
    },
    "a convolution along channels and columns": (
        lambda: net(lambda n, x: n.c(x.transpose(1, 2)).transpose(1, 2), c=conv(8, 8)),
        "a c b",
    ),
    "a mean as wide as the channels": (
        lambda: net(lambda _, x: torch.cat([x, x.mean(1, True).expand_as(x)], 1), 16),
        "a b",
    ),
    "where": (lambda: net(lambda _, x: torch.where(x > 0, x, x * 0.1)), "a b"),
    "masked_fill": (lambda: net(lambda _, x: x.masked_fill(x < 0, 0.5)), "a b"),
    "maxout": (lambda: net(lambda n, x: torch.max(n.c(x), x), c=conv(8, 8)), "a b"),
    "max over pixels": (
        lambda: net(lambda n, x: x + n.c(x.flatten(2).max(-1)[0][..., None, None]), c=conv(8, 8)),
        "a b",
    ),
    # parameters without a layer
    "position embedding": (lambda: net(lambda n, x: x + n.pos, pos=param(1, 8, 8, 8)), "a b"),
    "embedded tokens": (
        lambda: Net(
            tokens, a=conv(3, 8), pos=param(1, 64, 8), mix=nn.Linear(8, 4), head=nn.Linear(4, 4)
        ),
        "a mix",
    ),
    "a buffer per channel": (
        lambda: nn.Sequential(Normalised(), net()),
        "1.a 1.b",
    ),
    "matmul with a parameter": (
        lambda: net(lambda n, x: (x.movedim(1, -1) @ n.w).movedim(-1, 1), w=param(8, 8)),
        "a w b",
    ),
    "addmm": (
        lambda: net(
            lambda n, x: x * torch.addmm(n.c, x.mean((2, 3)), n.d.weight.t())[..., None, None],
            c=param(8),
            d=nn.Linear(8, 8, bias=False),
        ),
        "a b",
    ),
    # resolutions
    "upsample": (lambda: net(lambda _, x: F.interpolate(x, size=5, mode="bilinear")), "a b"),
    "transposed": (
        lambda: net(lambda n, x: n.c(x), 6, c=nn.ConvTranspose2d(8, 6, 2, 2)),
        "a c b",
    ),
    "transposed, depthwise": (
        lambda: net(lambda n, x: n.c(x), c=nn.ConvTranspose2d(8, 8, 2, 2, groups=8)),
        "a b",
    ),
    "transposed, added": (
        lambda: net(
            lambda n, x: n.c(x) + F.interpolate(x, scale_factor=2.0),
            c=nn.ConvTranspose2d(8, 8, 2, 2),
        ),
        "a b",
    ),
    # heads
    "sigmoid of one head without a bias": (
        lambda: Net(
            lambda n, x: n.head(n.a(x).mean((2, 3))).sigmoid(),
            a=conv(3, 8),
            head=nn.Linear(8, 4, bias=False),
        ),
        "a",
    ),
    "log_softmax over classes": (
        lambda: Net(
            lambda n, x: n.head(n.a(x)).mean((2, 3)).log_softmax(1), a=conv(3, 8), head=conv(8, 4)
        ),
        "a",
    ),
    "two heads": (
        lambda: Net(
            lambda n, x: torch.cat([h(n.a(x).mean((2, 3))) for h in (n.h1, n.h2)], 1),
            a=conv(3, 8),
            h1=nn.Linear(8, 4),
            h2=nn.Linear(8, 2),
        ),
        "a",
    ),
}  # fmt: skip
"""Name -> the network, and its groups."""


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str, tmp_path: Path) -> None:
    build, expected = RIGHT[name]
    pruned = cut(build, tmp_path)
    assert list(pruned.pruning.plan.kept) == expected.split()


# --- kinds of numbers, images, pins ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cut_like_single(dtype: torch.dtype, tmp_path: Path) -> None:
    module = net(lambda n, x: n.c(x), c=nn.BatchNorm2d(8))
    single = zoo.prune(module, IMAGES, cf=2, criterion="l1", profile="greedy").pruning.plan
    pruned = zoo.prune(module.to(dtype), IMAGES.to(dtype), cf=2, criterion="l1", profile="greedy")
    assert pruned.pruning.plan.widths == single.widths
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert pruned(IMAGES.to(dtype)).dtype == dtype
    zoo.save(pruned, tmp_path / "half")
    again = zoo.load_pruned(tmp_path / "half", skeleton=module)
    assert {p.dtype for p in again.parameters()} == {dtype}


def test_frozen_parameters_stay_frozen() -> None:
    module = net(lambda n, x: n.c(x), c=conv(8, 8))
    module.c.requires_grad_(False)
    pruned = zoo.prune(module, IMAGES, cf=2)
    frozen = {name for name, p in pruned.named_parameters() if not p.requires_grad}
    assert frozen == {"c.weight", "c.bias"}


def test_tied_and_shared_parameters_stay_so() -> None:
    module = tied_weights()
    pruned = zoo.prune(module, IMAGES, profile=halves(channel_groups(module, IMAGES)))
    assert pruned.c.weight is pruned.d.weight
    assert pruned.c.weight.shape[:2] == (4, 4)
    pruned = zoo.prune(two_names(), IMAGES, cf=2)
    assert pruned.alias is pruned.pos
    assert pruned.same is pruned.c


def test_grey_oblong_images(tmp_path: Path) -> None:
    def build() -> nn.Module:
        flat = lambda n, x: n.head(n.b(n.a(x).relu()).flatten(1))  # noqa: E731
        return Net(flat, a=conv(1, 8), b=conv(8, 6), head=nn.Linear(6 * 4 * 12, 4))

    pruned = cut(build, tmp_path, torch.rand(2, 1, 4, 12))
    assert pruned.head.in_features == len(pruned.b.weight) * 48


def test_a_compiled_call_is_left_behind() -> None:
    module = net()
    module.compile(backend="eager")
    pruned = zoo.prune(module, IMAGES, cf=2)
    assert len(pruned.a.weight) < 8
    assert pruned(IMAGES).shape == (2, 4)


def test_slices_count_again_after_the_removal_of_any_channels() -> None:
    """Halves that are swapped agree in every shape, whatever is cut: their bounds must not."""
    module = randomised(net(lambda _, x: torch.cat([x[:, 4:], x[:, :4]], 1)))
    x = IMAGES.double()
    program, groups = analyse(module, x)
    assert groups.sizes == (4, 8)
    for seed in range(5):
        plan = zoo.prune(module, x, profile=halves(groups), seed=seed).pruning.plan
        assert violation(module, program, groups, plan, x) < 1e-9


@pytest.mark.parametrize("weights", [False, True])
def test_macs_of_attention_are_those_of_torch(weights: bool) -> None:
    module = attention(weights).eval()
    pruned = zoo.prune(module, IMAGES, cf=1.2, metric="macs")
    plan = pruned.pruning.plan
    assert channel_groups(module, IMAGES).fixed_macs == 2 * 64 * 64 * 8
    for network, macs in ((module, plan.dense.macs), (pruned, plan.pruned.macs)):
        plain = sdpa_kernel(SDPBackend.MATH)  # of fused attention some torches count nothing
        with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
            torch.backends.mha.set_fastpath_enabled(False)
            network(IMAGES)
        assert counter.get_total_flops() == 2 * macs * len(IMAGES)  # it counts additions too
    assert cost_model(channel_groups(module, IMAGES[:1])).dense == plan.dense


def test_macs_of_a_constant_kernel_are_those_of_torch() -> None:
    blur = lambda n, x: F.conv2d(x, n.kernel, groups=len(x[0]))  # noqa: E731
    module = net(blur).eval()
    module.register_buffer("kernel", torch.ones(8, 1, 3, 3))
    pruned = zoo.prune(module, IMAGES, cf=2, metric="macs")
    assert len(pruned.kernel) == len(pruned.a.weight)
    for network, macs in (
        (module, pruned.pruning.plan.dense.macs),
        (pruned, pruned.pruning.plan.pruned.macs),
    ):
        assert macs_of(network, 8) == macs


def test_groups_that_are_pinned_twice_or_not_there_are_named() -> None:
    module = net(lambda n, x: n.c(x), c=conv(8, 8))
    widths = zoo.plan(module, IMAGES, cf=2, keep={"a": 0.5, "c": 1.0}).widths
    assert (widths["a"], widths["c"]) == (4, 8)
    nested = nn.Sequential(net(lambda n, x: n.c(x), c=conv(8, 8)))
    with pytest.raises(ZooError, match=r"pins '0\.a' twice, by '0' and '0\.a'"):
        zoo.prune(nested, IMAGES, cf=1.5, keep={"0": 0.5, "0.a": 1.0})
    with pytest.raises(GraphError, match=r"'cc'\. Did you mean 'c'\? Known: a, c, b"):
        zoo.prune(module, IMAGES, cf=1.5, keep={"cc": 1.0})
    groups = channel_groups(module, IMAGES)
    profile = halves(groups)
    stray = Profile(
        "live", "params", 2.0, 2.0, Reference(4, 8),
        {**profile.keep_ratios, "conv1": 0.5}, {**profile.kept, "conv1": 4},
    )  # fmt: skip
    with pytest.raises(GraphError, match=r"Unknown channel group 'conv1'\..*Known: a, c, b"):
        zoo.prune(module, IMAGES, profile=stray)
