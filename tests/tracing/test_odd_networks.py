"""Networks as people write them: pruned right, kept whole with a reason, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from odd import IMAGES, Build, Net, conv, cut, halves, net, param
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.errors import FactorError, GraphError, ZooError
from zoo.spec.cost import cost_model
from zoo.spec.profile import Profile, Reference
from zoo.surgery.surgery import named_tensors
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


def slice_assignment(n: nn.Module, x: Tensor) -> Tensor:
    x = n.c(x)
    x[:, :4] += n.d(x[:, 4:].clone())
    return x


def non_local(n: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (part(x).flatten(2).transpose(1, 2) for part in (n.q, n.k, n.v))
    return ((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


def tokens(n: nn.Module, x: Tensor) -> Tensor:
    rows = n.a(x).relu().flatten(2).transpose(1, 2) + n.pos
    return n.head(n.mix(rows).mean(1))


def attention(weights: bool = False) -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        rows = n.b(n.a(x).relu()).flatten(2).transpose(1, 2)
        rows = rows + n.mix(rows, rows, rows, need_weights=weights)[0]
        return n.head(n.up(rows).relu().mean(1))

    mix = nn.MultiheadAttention(8, 2, batch_first=True)
    parts = {"b": conv(6, 8), "up": nn.Linear(8, 12), "head": nn.Linear(12, 4)}
    return Net(run, a=conv(3, 6), mix=mix, **parts)


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


# --- kept whole, with a reason --------------------------------------------------------------------

WHOLE: dict[str, tuple[Build, str, str]] = {
    "one channel per group": (
        lambda: net(lambda n, x: n.c(x), c=nn.GroupNorm(8, 8)), "a", "one unit",
    ),
    "softmax over channels": (lambda: net(lambda _, x: x.softmax(1)), "a", "softmax"),
    "softmax over copies of a mean": (
        lambda: net(lambda _, x: x * x.mean(1, True).expand_as(x).softmax(1)), "a", "softmax",
    ),
    "roll": (lambda: net(lambda _, x: x.roll(2, 1)), "a", "rolled"),
    "one channel": (lambda: net(lambda _, x: x * x[:, -1:]), "a", "indexed by a position"),
    "some channels": (lambda: net(lambda _, x: x[:, [0, 3, 1]], 3), "a", "tensor of positions"),
    "the last four": (lambda: net(lambda _, x: x[:, -4:], 4), "a", "constant at node 'slice"),
    "swapped halves": (
        lambda: net(lambda _, x: torch.cat([x[:, 4:], x[:, :4]], 1)), "a", "constant at node 'sl",
    ),
    "swapped last": (
        lambda: net(lambda _, x: torch.cat([x[:, -4:], x[:, :-4]], 1)), "a", "constant at node 's",
    ),
    "swapped by the half of the width": (
        lambda: net(lambda _, x: torch.cat([x[:, len(x[0]) // 2 :], x[:, : len(x[0]) // 2]], 1)),
        "a", "its width 8 is a constant at node 'slice",
    ),
    "slice assignment": (
        lambda: net(slice_assignment, c=conv(8, 8), d=conv(4, 4)), "d", "constant at node 'slice",
    ),
    "new zeros": (
        lambda: net(lambda _, x: x + x.new_zeros(8, 1, 1)), "a", "to no channel group",
    ),
    "local response norm": (
        lambda: net(lambda n, x: n.c(x), c=nn.LocalResponseNorm(5)), "a", "to no channel group",
    ),
    "matmul": (
        lambda: net(lambda _, x: (torch.eye(8).to(x) @ x.flatten(2)).view(x.shape)),
        "a", "attention",
    ),
    "einsum": (
        lambda: net(lambda n, x: torch.einsum("bchw,cd->bdhw", x, n.w), w=param(8, 8)),
        "a", "multiplied",
    ),
    "non-local": (
        lambda: net(non_local, q=conv(8, 6), k=conv(8, 6), v=conv(8, 8)), "a", "constant at node",
    ),
    "attention": (attention, "b", "constant at node 'view"),
    "encoder layer": (
        lambda: Net(
            lambda n, x: n.head(n.mix(n.b(n.a(x).relu()).flatten(2).transpose(1, 2)).mean(1)),
            a=conv(3, 6), b=conv(6, 8), mix=nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
            head=nn.Linear(8, 4),
        ),
        "b", "constant at node 'view",
    ),
    "transposed in groups": (
        lambda: net(lambda n, x: n.c(x), c=nn.ConvTranspose2d(8, 8, 2, 2, groups=2)),
        "a", "grouped transposed",
    ),
    "a number of groups": (
        lambda: net(lambda n, x: F.conv2d(x, n.c, groups=8), c=param(8, 1, 3, 3)),
        "a", "its width 8 is a constant at node 'conv2d",
    ),
    "a flat view": (
        lambda: Net(
            lambda n, x: n.head(n.b(n.a(x)).view(-1, 512)),
            a=conv(3, 8), b=conv(8, 8), head=nn.Linear(512, 4),
        ),
        "b", "its width 512 is a constant at node 'view'",
    ),
    "cumsum": (lambda: net(lambda _, x: x.cumsum(1)), "a", "in order"),
    "argmax": (lambda: net(lambda _, x: x * x.argmax(1, True)), "a", "searched for a position"),
    "positions of a maximum": (
        lambda: net(lambda _, x: x * x.max(1, True)[1]), "a", "a position (max, min), at node",
    ),
    "sorted channels": (lambda: net(lambda _, x: x.sort(1)[0]), "a", "in order"),
    "the best channels": (
        lambda: net(lambda _, x: x.topk(8, 1)[0]), "a", "the operator 'topk', which has no rule",
    ),
    "recurrent": (
        lambda: Net(
            lambda n, x: n.head(n.mix(n.b(n.a(x)).mean(2).transpose(1, 2))[0].mean(1)),
            a=conv(3, 8), b=conv(8, 8), mix=nn.LSTM(8, 6, batch_first=True), head=nn.Linear(6, 4),
        ),
        "b", "'lstm', which has no rule, at node 'lstm' of module 'mix', File",
    ),
    "a weight made by a layer": (
        lambda: net(
            lambda n, x: F.conv2d(x, n.c(n.d).view(8, 8, 1, 1)), c=nn.Linear(4, 64), d=param(4)
        ),
        "a", "whose weight has no labels ('conv2d'), at node",
    ),
    "written in place by an operator": (
        lambda: net(lambda _, x: x.index_put((torch.tensor([0]),), x[1]).cumsum_(1)), "a", "at n",
    ),
    # widths that are read from the tensor and computed with
    "groups of four": (
        lambda: net(lambda _, x: x.unflatten(1, (len(x[0]) // 4, 4)).transpose(1, 2).flatten(1, 2)),
        "a", "its width 4",
    ),
    "a normalisation of as many groups": (
        lambda: net(lambda _, x: F.group_norm(x, x.shape[1] // 4)), "a", "computation that fails (",
    ),
    "a scale of the width": (
        lambda: net(lambda _, x: x * x.mean((1, 2, 3), True) / len(x[0]) ** 0.5),
        "a", "its width 8 is used as a number at node 'div'",
    ),
    "a temperature of the width": (
        lambda: net(lambda _, x: (x.flatten(2) * 0.5).clamp(max=x.size(1) / 16).view_as(x)),
        "a", "its width 8 is used as a number at node 'clamp'",
    ),
    "a loop over the width": (
        lambda: net(lambda _, x: x * sum(x.mean() for _ in range(x.shape[1]))),
        "a", "decides what is computed",
    ),
    "quarters by slices": (
        lambda: net(lambda _, x: torch.cat(
            [x[:, i : i + x.shape[1] // 4] * i for i in range(0, x.shape[1], x.shape[1] // 4)], 1)),
        "a", "its width",
    ),
    "a branch on values": (
        lambda: net(lambda _, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))),
        "a", "'cond', which has no rule",
    ),
}  # fmt: skip
"""Name -> the network, a module of it that stays whole at least in part, and why."""


@pytest.mark.parametrize("name", WHOLE)
def test_kept_whole_with_a_reason(name: str, tmp_path: Path) -> None:
    build, module, reason = WHOLE[name]
    plan = cut(build, tmp_path).pruning.plan
    assert reason in plan.unprunable[module]


# --- refused, by name -----------------------------------------------------------------------------


def masked_weight() -> nn.Module:
    module = net()
    prune.l1_unstructured(module.b, "weight", 0.3)
    return module


REFUSED: dict[str, tuple[Build, str]] = {
    "weight_norm": (
        lambda: net(lambda n, x: n.c(x), c=parametrizations.weight_norm(conv(8, 8))),
        r"Conv2d 'c' computes its weight .*remove_parametrizations",
    ),
    "old weight_norm": (
        lambda: net(lambda n, x: n.c(x), c=nn.utils.weight_norm(conv(8, 8))),
        r"Conv2d 'c' computes its weight .*remove_weight_norm",
    ),
    "spectral_norm": (
        lambda: net(lambda n, x: n.c(x), c=parametrizations.spectral_norm(conv(8, 8))),
        r"Conv2d 'c' computes its weight",
    ),
    "old spectral_norm": (
        lambda: net(lambda n, x: n.c(x), c=nn.utils.spectral_norm(conv(8, 8))),
        r"Conv2d 'c' computes its weight",
    ),
    "a pruning mask": (masked_weight, r"Conv2d 'b' computes its weight .*prune\.remove"),
    "lazy": (
        lambda: net(lambda n, x: n.c(x), c=nn.LazyConv2d(8, 1)),
        r"LazyConv2d 'c' has no parameters yet: run the network once",
    ),
    "a wrapper": (lambda: nn.DataParallel(net()), r"DataParallel is a wrapper.*its module"),
    "a compiled part": (
        lambda: net(lambda n, x: n.c(x), c=torch.compile(conv(8, 8), backend="eager")),
        r"OptimizedModule 'c' is compiled",
    ),
    "TorchScript": (lambda: torch.jit.trace(net(), IMAGES), r"is TorchScript: prune the network"),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}),
        r"Linear 'head' is quantised: prune the floating-point",
    ),
    "control flow": (
        lambda: net(lambda n, x: n.c(x) if x.sum() > 0 else x, c=conv(8, 8)),
        r"cannot trace Net: Could not guard .* \(/.*odd_networks\.py:\d+: .*x\.sum\(\) > 0",
    ),
    "no convolution": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "no channel group that can be prun",
    ),
    "depthwise alone": (
        lambda: Net(
            lambda n, x: n.head(n.a(x).mean((2, 3))), a=conv(3, 3, groups=3), head=nn.Linear(3, 4)
        ),
        "no channel group that can be pruned",
    ),
    "no tensors": (lambda: Net(lambda n, x: len(n.a(x)), a=conv(3, 8)), "returns int, which con"),
    "two inputs": (
        lambda: Net(lambda n, x, y: n.a(x) + y, a=conv(3, 8)), r"does not run on .*argument: 'y'",
    ),
}  # fmt: skip
"""Name -> the network, and the message."""


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    build, message = REFUSED[name]
    with pytest.raises(GraphError, match=message) as caught:
        zoo.prune(build(), IMAGES, cf=1.5)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


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


def test_a_factor_out_of_reach_names_what_stays_whole_and_the_line_that_holds_it() -> None:
    def forward(n: nn.Module, x: Tensor) -> Tensor:
        return n.head(n.b(n.a(x).relu()).relu().view(-1, 8 * 8 * 8))

    module = Net(forward, a=conv(3, 8), b=conv(8, 8), head=nn.Linear(512, 4))
    with pytest.raises(FactorError) as caught:
        zoo.prune(module, IMAGES, cf=50)
    said = str(caught.value)
    for part in ("this policy reaches 1 to ", "'b' (its width 512", "'view'", "x.flatten(1)"):
        assert part in said
    line = forward.__code__.co_firstlineno + 1
    assert f'{Path(__file__).name}", line {line}' in said
    aligned = "'a' (has 8 channels, no more than align=8)"
    with pytest.raises(FactorError, match=re.escape(aligned)):
        zoo.prune(module, IMAGES, cf=50, align=8)


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
        with FlopCounterMode(display=False) as counter:
            network(IMAGES[:1])
        assert counter.get_total_flops() == 2 * macs


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


def test_the_caller_keeps_what_was_given() -> None:
    """Neither a refusal nor a success leaves a trace in the network."""
    for build in (RIGHT["two names"][0], WHOLE["swapped halves"][0], REFUSED["lazy"][0]):
        module = build().train()
        before = {name: id(t) for name, t in named_tensors(module).items()}
        try:
            zoo.prune(module, IMAGES, cf=1.2)
        except GraphError:
            assert module.c.has_uninitialized_params()
        assert {name: id(t) for name, t in named_tensors(module).items()} == before
        assert module.training
