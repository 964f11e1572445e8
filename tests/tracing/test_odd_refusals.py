"""Networks as people write them: what stays whole, with a reason, and what is refused by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from odd import IMAGES, Build, Net, attention, conv, cut, net, param
from test_odd_networks import RIGHT
from torch import Tensor, nn
from torch.ao.quantization import (
    get_default_qat_qconfig,
    get_default_qconfig,
    prepare,
    prepare_qat,
)
from torch.nn.utils import parametrizations, prune

import zoo
from zoo.errors import FactorError, GraphError
from zoo.surgery.surgery import named_tensors

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def slice_assignment(n: nn.Module, x: Tensor) -> Tensor:
    x = n.c(x)
    x[:, :4] += n.d(x[:, 4:].clone())
    return x


def non_local(n: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (part(x).flatten(2).transpose(1, 2) for part in (n.q, n.k, n.v))
    return ((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


def gated(n: nn.Module, x: Tensor) -> Tensor:
    """The halves of one layer's output, where another layer's width says where they end."""
    half, y = x.shape[1] // 2, n.c(x)
    return torch.cat([y[:, :half].sigmoid(), y[:, half:]], 1)


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
    "swapped by a split at a position": (
        lambda: net(lambda _, x: torch.cat(torch.tensor_split(x, (4,), 1)[::-1], 1)),
        "a", "is split at positions, at node 'tensor_split",
    ),
    "slice assignment": (
        lambda: net(slice_assignment, c=conv(8, 8), d=conv(4, 4)), "d", "constant at node 'slice",
    ),
    "new zeros": (
        lambda: net(lambda _, x: x + x.new_zeros(8, 1, 1)), "a", "to no channel group",
    ),
    "a tensor of constants as another": (
        lambda: net(lambda n, x: x * n.w.view_as(x[0]), w=param(8 * 64)),
        "a", "to no channel group, at node 'view_as'",
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
    "halves of another layer's output": (
        lambda: net(gated, c=conv(8, 8)),
        "a", "its width 8 decides where channels are sliced at node 'slice_1' of module '', File",
    ),
    "a loop over a layer": (
        lambda: net(
            lambda n, x: [x := n.c(x).relu() for _ in range(x.shape[1] // 4)][-1], c=conv(8, 8)
        ),
        "a", "that fails (was called fewer times than in the traced program) at a call of 'c'",
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


def prepared(step: Callable[[nn.Module], nn.Module], config: object) -> nn.Module:
    module = net().train()
    module.qconfig = config
    with warnings.catch_warnings():  # observers warn of a setting that torch's own default has
        warnings.simplefilter("ignore")
        return step(module)


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
    "an exported program": (
        lambda: torch.export.export(net(), (IMAGES,)).module(),
        r"GraphModule is a program of torch\.export: prune the network that it was made from",
    ),
    "an exported program, unflattened": (
        lambda: torch.export.unflatten(torch.export.export(net(), (IMAGES,))),
        r"UnflattenedModule is a program of torch\.export",
    ),
    "an exported part": (
        lambda: net(lambda n, x: n.c(x), c=torch.export.export(conv(3, 3), (IMAGES,)).module()),
        r"GraphModule 'c' is a program of torch\.export",
    ),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}),
        r"Linear 'head' is quantised: prune the floating-point",
    ),
    "prepared for training in int8": (
        lambda: prepared(prepare_qat, get_default_qat_qconfig("x86")),
        r"Conv2d 'a' is prepared for quantisation: prune the floating-point network, then prepare",
    ),
    "prepared for calibration": (
        lambda: prepared(prepare, get_default_qconfig("x86")),
        r"Observer 'a\.activation_post_process' is prepared for quantisation",
    ),
    "control flow": (
        lambda: net(lambda n, x: n.c(x) if x.sum() > 0 else x, c=conv(8, 8)),
        r"cannot trace Net: Could not guard .* \(/.*odd_refusals\.py:\d+: .*x\.sum\(\) > 0",
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


def test_a_network_that_keeping_channels_whole_does_not_save_is_advised() -> None:
    """A later layer's width decides how often an earlier one is called."""

    def often(n: nn.Module, x: Tensor) -> Tensor:
        return [x := n.c(x).relu() for _ in range(len(n.b.weight) // 4)][-1]

    module = net(often, c=conv(8, 8))
    message = r"'c': was called fewer times .* program\. Prune it with rewrite=True\.$"
    with pytest.raises(GraphError, match=message):
        zoo.prune(module, IMAGES, cf=1.3)
    assert zoo.prune(module, IMAGES, cf=1.3, rewrite=True).pruning.plan.got > 1.2


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


@pytest.mark.parametrize("inside", [False, True])
def test_an_exported_program_is_not_evaluated(inside: bool) -> None:
    program: nn.Module = torch.export.export(net(), (IMAGES,)).module()
    module = nn.Sequential(nn.Identity(), program) if inside else program
    modes = [layer.training for layer in module.modules()]
    with pytest.raises(GraphError, match=r"cannot be put in eval mode: .* take the network that"):
        zoo.evaluate(module, [(IMAGES, torch.tensor([0, 1]))])
    assert [layer.training for layer in module.modules()] == modes
