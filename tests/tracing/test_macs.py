"""MACs: those of torch, dense and pruned, whatever computes them and for any batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from odd import IMAGES, Build, conv, net, param
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.tracing.graph import channel_groups

Run = Callable[[nn.Module, Tensor], Tensor]


def counted(module: nn.Module, x: Tensor) -> int:
    """What torch counts for one image, alone in its batch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(x[:1])
    return counter.get_total_flops() // 2


def assert_counts(module: nn.Module, x: Tensor, uncounted: int = 0) -> None:
    """The plan has the MACs of torch, and `uncounted` that torch leaves out, at every batch."""
    pruned = zoo.prune(module, x, cf=1.1, metric="macs", profile="equal")
    plan = pruned.pruning.plan
    assert plan.dense.macs == counted(module, x) + uncounted
    assert plan.pruned.macs == counted(pruned, x) + uncounted
    assert channel_groups(module, x[:1]).fixed_macs == channel_groups(module, x).fixed_macs
    assert zoo.plan(module, x[:1], cf=1.1, metric="macs", profile="equal").dense == plan.dense


def attended(n: nn.Module, x: Tensor) -> Tensor:
    """A convolution whose weight is a mixture of four, another for every image."""
    b, c, h, w = x.shape
    mixed = n.c(x.mean((2, 3))).softmax(1) @ n.w.view(4, -1)
    kernels = mixed.view(b * 8, 8, 3, 3)
    return F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b).view(b, 8, h, w)


def modulated(n: nn.Module, x: Tensor) -> Tensor:
    """A convolution of StyleGAN2: one stored weight, scaled for every image."""
    b, c, h, w = x.shape
    kernels = (n.w * n.c(x.mean((2, 3))).view(b, 1, c, 1, 1)).view(-1, c, 3, 3)
    return F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b).view(b, -1, h, w)


# --- operators without a rule ---------------------------------------------------------------------

KNOWN_TO_TORCH: dict[str, Run] = {
    "tensordot": lambda n, x: torch.tensordot(x, n.w, dims=([1], [0])).permute(0, 3, 1, 2),
    "baddbmm": lambda _, x: x * torch.baddbmm(
        x.new_zeros(len(x), 8, 8), x.flatten(2), x.flatten(2).transpose(1, 2)
    ).mean(2)[..., None, None],
    "inner": lambda n, x: torch.inner(x.mean((2, 3)), n.w)[..., None, None] * x,
    "distances": lambda n, x: torch.cdist(x.mean((2, 3)), n.w)[..., None, None] * x,
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_TO_TORCH)
def test_operators_without_a_rule_count_as_torch_counts_them(name: str) -> None:
    assert_counts(net(KNOWN_TO_TORCH[name], w=param(8, 8)), IMAGES)


OWN_FORMULA: dict[str, tuple[Run, Build, int]] = {
    "bilinear": (
        lambda n, x: x * n.c(x.mean((2, 3)), x.mean((2, 3)))[..., None, None],
        lambda: nn.Bilinear(8, 8, 8), 8**3,
    ),
    "deformable": (
        lambda n, x: n.c(x, x.repeat(1, 3, 1, 1)[:, :18]),
        lambda: torchvision.ops.DeformConv2d(8, 8, 3, padding=1), 8 * 8 * 9 * 64,
    ),
    "LSTM": (
        lambda n, x: n.c(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(x.shape),
        lambda: nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True), 64 * 2 * 2 * 16 * (8 + 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_FORMULA)
def test_operators_that_torch_does_not_count(name: str) -> None:
    run, build, macs = OWN_FORMULA[name]
    assert_counts(net(run, c=build()), IMAGES, macs)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "layer", [nn.RNN(8, 8), nn.GRU(8, 4, bidirectional=True), nn.LSTM(8, 10, proj_size=8)]
)
def test_recurrent_layers_that_torch_counts_step_by_step(layer: nn.RNNBase) -> None:
    layer.batch_first = True
    assert_counts(net(OWN_FORMULA["LSTM"][0], c=layer), IMAGES)


def test_a_factor_that_a_recurrent_layer_keeps_out_of_reach_is_not_told_as_met() -> None:
    module = net(OWN_FORMULA["LSTM"][0], c=nn.LSTM(8, 8, 8, batch_first=True))
    with pytest.raises(
        zoo.ZooError, match=r"2 cannot be reached here: .*'lstm', which has no rule"
    ):
        zoo.prune(module, IMAGES, cf=2, metric="macs")


def test_what_is_not_counted_says_so() -> None:
    branch = net(lambda _, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))
    why = channel_groups(branch, IMAGES).unprunable["a"]
    assert "'cond', which has no rule, and whose MACs are not counted, at node" in why


# --- weights that are computed --------------------------------------------------------------------

COMPUTED: dict[str, tuple[Run, dict[str, Build]]] = {
    "mixed for every image": (
        attended, {"c": lambda: nn.Linear(8, 4), "w": lambda: param(4, 8, 8, 3, 3)},
    ),
    "scaled for every image": (
        modulated, {"c": lambda: nn.Linear(8, 8), "w": lambda: param(1, 8, 8, 3, 3)},
    ),
    "made by a layer": (
        lambda n, x: F.conv2d(x, n.c(n.d).view(8, 8, 1, 1)),
        {"c": lambda: nn.Linear(4, 64), "d": lambda: param(1, 4)},
    ),
    "of two weights": (
        lambda n, x: F.conv2d(x, torch.cat([n.c.weight, n.d.weight])),
        {"c": lambda: conv(8, 2, bias=False), "d": lambda: conv(8, 6, bias=False)},
    ),
    "thirds of one weight": (
        lambda n, x: sum(F.conv2d(x, part) for part in n.c.weight.chunk(3)).repeat(1, 4, 1, 1),
        {"c": lambda: conv(8, 6, bias=False)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_are_computed(name: str) -> None:
    run, parts = COMPUTED[name]
    assert_counts(net(run, **{part: build() for part, build in parts.items()}), IMAGES)


# --- work that is not for every image -------------------------------------------------------------


def queried(n: nn.Module, x: Tensor) -> Tensor:
    """Queries that are one constant, copied for every image, as in DETR."""
    return x * n.c(n.d.expand(len(x), -1, -1)).mean(1)[..., None, None]


CONSTANTS: dict[str, tuple[Run, dict[str, Build]]] = {
    "a layer of a constant": (
        lambda n, x: x + n.c(n.d).transpose(1, 2).reshape(1, 8, 8, 8),
        {"c": lambda: nn.Linear(2, 8), "d": lambda: param(1, 64, 2)},
    ),
    "a convolution of a constant": (
        lambda n, x: x + n.c(n.d), {"c": lambda: conv(3, 8), "d": lambda: param(1, 3, 8, 8)},
    ),
    "copies of a constant": (
        queried, {"c": lambda: nn.Linear(5, 8), "d": lambda: param(1, 6, 5).requires_grad_(False)},
    ),
    "a constant repeated in one row": (
        lambda n, x: x + n.c(n.d.repeat_interleave(len(x)).view(5, -1).t())[..., None, None],
        {"c": lambda: nn.Linear(5, 8), "d": lambda: param(1, 5).requires_grad_(False)},
    ),
    "zeros for every image": (
        lambda n, x: x + n.c(torch.zeros(len(x), 5))[..., None, None],
        {"c": lambda: nn.Linear(5, 8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_work_on_constants_does_not_depend_on_the_batch(name: str) -> None:
    run, parts = CONSTANTS[name]
    module = net(run, **{part: build() for part, build in parts.items()})
    assert_counts(module, IMAGES)
    assert_counts(module, IMAGES.repeat(3, 1, 1, 1))


# --- products of activations ----------------------------------------------------------------------


def test_einsum() -> None:
    def mixed(_: nn.Module, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        return torch.einsum("bij,bcj->bci", torch.einsum("bci,bcj->bij", rows, rows), rows).view_as(
            x
        )

    assert_counts(net(mixed), IMAGES)
    assert_counts(
        net(lambda n, x: torch.einsum("b...hw,ww->b...hw", x, n.w), w=param(8, 8)), IMAGES
    )
