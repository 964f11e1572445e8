"""Networks whose `forward` has widths as constants, pruned as their own traced program."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from odd import IMAGES, Build, Net, conv, double, halves, net, param
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import GraphError, ZooError
from zoo.models import build_model
from zoo.surgery.masking import masked
from zoo.tracing.calls import Inputs, call, leaves, mapped
from zoo.tracing.contract import randomised, violation
from zoo.tracing.graph import analyse, channel_groups
from zoo.tracing.rewriting import rewritten


def constant(run: Callable[..., Tensor], **parts: object) -> Build:
    return lambda: Net(run, a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 8), **copy.deepcopy(parts))


def body(n: nn.Module, x: Tensor) -> Tensor:
    return n.b(n.n(n.a(x)).relu()).relu()


def shuffled(n: nn.Module, x: Tensor) -> Tensor:
    x = body(n, x).view(-1, 4, 2, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)
    return n.c(x).mean((2, 3))


def halved(n: nn.Module, x: Tensor) -> Tensor:
    one, two = body(n, x).split([3, 5], 1)
    return n.c(one).mean((2, 3)) + n.d(two).mean((2, 3))


FLAT = {"head": nn.Linear(512, 4)}
CONSTANTS: dict[str, tuple[Build, Inputs, str]] = {
    "view": (constant(lambda n, x: n.head(body(n, x).view(-1, 8 * 8 * 8)), **FLAT), IMAGES, "a b"),
    "the batch too": (
        constant(lambda n, x: n.head(body(n, x).reshape(x.shape[0], 512)), **FLAT), IMAGES, "a b",
    ),
    "unflatten": (
        constant(lambda n, x: n.head(body(n, x).flatten(1).unflatten(1, (8, 64)).mean(2)),
                 head=nn.Linear(8, 4)),
        IMAGES, "a b",
    ),
    "split": (constant(halved, c=conv(3, 4), d=conv(5, 4)), IMAGES, "a b b[1]"),
    "slices": (
        constant(lambda n, x: n.c(body(n, x)[:, :4]).mean((2, 3)) + n.d(body(n, x)[:, 4:])
                 .mean((2, 3)), c=conv(4, 4), d=conv(4, 4)),
        IMAGES, "a b b[1]",
    ),
    "layer norm": (
        constant(lambda n, x: n.head(F.layer_norm(body(n, x).mean((2, 3)), (8,), n.w)),
                 w=param(8), head=nn.Linear(8, 4)),
        IMAGES, "a b",
    ),
    "two inputs by name": (
        lambda: Net(lambda n, image, signal: n.head(torch.cat(
            [n.a(image).view(-1, 512), n.s(signal).view(-1, 6 * 12)], 1)),
            a=conv(3, 8), s=nn.Conv1d(1, 6, 5), head=nn.Linear(584, 4)),
        (IMAGES, torch.rand(2, 1, 16)), "a s",
    ),
}  # fmt: skip
"""Name -> a network that has widths as constants, what it takes, and its groups when rewritten."""


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_follow_the_widths(name: str, tmp_path: Path) -> None:
    build, x, groups = CONSTANTS[name]
    x, module = double(x), randomised(build())
    before = channel_groups(module, x).names
    profile = halves(channel_groups(rewritten(module, x), x))
    pruned = zoo.prune(module, x, profile=profile, rewrite=True)
    plan = pruned.pruning.plan
    assert list(plan.kept) == groups.split()
    assert set(before) < set(plan.kept)
    # the same contract, and the module's own code with zeros
    program, found = analyse(rewritten(module, x), x)
    assert violation(rewritten(module, x), program, found, plan, x) < 1e-9
    if name != "layer norm":  # a reduction over channels, of the kept ones alone
        expected = call(masked(module, found, plan), x)
        torch.testing.assert_close(call(pruned, x), expected, rtol=1e-9, atol=1e-9)
    zoo.save(pruned, tmp_path / "pruned")
    again = zoo.load_pruned(tmp_path / "pruned", skeleton=build())
    assert again.pruning == pruned.pruning
    for count in (1, 2, 5):
        batch = mapped(lambda t, n=count: torch.cat([t] * 3)[:n], x)
        assert torch.equal(call(again, batch), call(pruned, batch))
        assert len(call(pruned, batch)) == count


def test_positions_follow_the_widths_before_them() -> None:
    """The first half keeps other channels than the second: verification compares the outputs."""
    swap = lambda _, x: torch.cat([x.narrow(1, 4, 4), x.narrow(1, 0, 4)], 1)  # noqa: E731
    module, kept = net(swap), {"a": 3, "a[1]": 1, "b": 4}
    profile = replace(halves(channel_groups(rewritten(module, IMAGES), IMAGES)), kept=kept)
    plan = zoo.prune(module, IMAGES, profile=profile, rewrite=True).pruning.plan
    assert plan.widths == kept


def test_it_computes_what_the_module_does_and_shares_its_tensors() -> None:
    module = build_model("torchvision:mobilenet_v2", 10).eval()
    x = torch.rand(2, 3, 32, 32)
    program = rewritten(module, x)
    assert torch.equal(program(x), module(x))
    own = {id(p) for p in module.parameters()}
    assert {id(p) for p in program.parameters()} == own


@pytest.mark.parametrize(
    ("layer", "images"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), IMAGES),  # depthwise: as many groups as channels are kept
        (nn.Conv2d(8, 16, 3, groups=8, padding="same"), IMAGES),
        (nn.Conv2d(8, 12, 1, groups=2), IMAGES),  # two groups, which become narrower
        (nn.Conv1d(8, 8, 3, groups=8), torch.rand(2, 3, 16)),
    ],
)
def test_grouped_convolutions_follow_the_widths(layer: nn.Module, images: Tensor) -> None:
    first = nn.Conv1d(3, 8, 1) if images.ndim == 3 else nn.Conv2d(3, 8, 1)
    module = randomised(
        Net(
            lambda n, x: n.head(F.relu(n.b(F.relu(n.a(x)))).flatten(2).mean(2)),
            a=first, b=layer, head=nn.Linear(layer.out_channels, 4),
        )
    )  # fmt: skip
    plain, program = (
        zoo.prune(module, double(images), cf=1.3, profile="equal", rewrite=rewrite)
        for rewrite in (False, True)
    )
    assert plain.pruning.plan.widths == program.pruning.plan.widths
    assert plain.pruning.plan.widths["a"] < 8
    torch.testing.assert_close(program(double(images)), plain(double(images)))


def test_it_trains_with_batch_norm_and_dropout_as_they_do() -> None:
    run = lambda n, x: n.head(n.d(body(n, x).view(-1, 512)))  # noqa: E731
    module = constant(run, d=nn.Dropout(0.5), **FLAT)()
    pruned = zoo.prune(module, IMAGES, cf=2, rewrite=True)
    assert torch.equal(pruned(IMAGES), pruned(IMAGES))
    means = pruned.get_buffer("n.running_mean").clone()
    pruned.train()
    assert not torch.equal(pruned(IMAGES), pruned(IMAGES))
    assert not torch.equal(pruned.get_buffer("n.running_mean"), means)
    data = TensorDataset(torch.rand(64, 3, 8, 8), torch.randint(0, 4, (64,)))
    result = zoo.finetune(pruned, data, data, recipe="quick")
    assert len(result.history) > 0
    pruned.eval()
    assert torch.equal(pruned(IMAGES), pruned(IMAGES))


def test_it_is_exported_at_any_batch(tmp_path: Path) -> None:
    build, _, _ = CONSTANTS["view"]
    pruned = zoo.prune(build(), IMAGES, cf=2, rewrite=True)
    zoo.export(pruned, tmp_path / "a.onnx")
    images = torch.rand(5, 3, 8, 8)
    got = zoo.InferenceSession(tmp_path / "a.onnx")(images)
    torch.testing.assert_close(got, pruned(images).detach(), rtol=1e-4, atol=1e-5)


def test_criteria_that_need_layers_see_those_of_the_module() -> None:
    build, _, _ = CONSTANTS["view"]
    module = build()
    data = TensorDataset(torch.rand(16, 3, 8, 8), torch.randint(0, 4, (16,)))
    for criterion in ("l1", "taylor"):
        plan = zoo.plan(module, IMAGES, cf=2, criterion=criterion, data=data, rewrite=True)
        assert plan.widths["b"] < 8


def test_outputs_keep_their_structure() -> None:
    run = lambda n, x: {"maps": body(n, x), "logits": n.head(body(n, x).view(-1, 512))}  # noqa: E731
    pruned = zoo.prune(constant(run, **FLAT)(), IMAGES, cf=1.1, rewrite=True)
    assert list(pruned(IMAGES)) == ["maps", "logits"]
    assert [t.shape for t in leaves(pruned(IMAGES))] == [(2, 8, 8, 8), (2, 4)]


def test_what_cannot_be_rewritten_says_so() -> None:
    for count in (lambda _: 2, len):
        fixed = constant(lambda n, x, c=count: n.head(body(n, x).view(c(x), 512)), **FLAT)()
        with pytest.raises(
            GraphError, match=r"its batch size 2 is a constant in forward too\. Take it"
        ):
            zoo.prune(fixed, IMAGES, cf=2, rewrite=True)
    build, _, _ = CONSTANTS["view"]
    with pytest.raises(ZooError, match="the metric is params or macs"):
        zoo.prune(build(), IMAGES, cf=2, metric="latency", rewrite=True)
    with pytest.raises(ZooError, match="prune with rewrite=True"):
        zoo.prune(build(), IMAGES, cf=50)
    counting = nn.Sequential(build(), nn.Unflatten(1, (4, 1)), nn.BatchNorm1d(4, momentum=None))
    with pytest.raises(GraphError, match="'2' cannot be rewritten: set a momentum"):
        zoo.prune(counting, IMAGES, cf=2, rewrite=True)


def test_the_module_is_left_alone() -> None:
    build, _, _ = CONSTANTS["view"]
    module = build().train()
    before = copy.deepcopy(module.state_dict())
    pruned = zoo.prune(module, IMAGES, cf=2, rewrite=True)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(7)
    assert module.training
    assert not module._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
