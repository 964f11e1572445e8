"""What callers put into their networks: it stays there, and the pruned network has its own."""

from __future__ import annotations

import threading
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from odd import IMAGES, Net, conv, net, param
from torch import Tensor, nn
from torch.ao import quantization

import zoo
from zoo.errors import GraphError
from zoo.tracing.dependencies import trace_key

# --- lists and dicts ------------------------------------------------------------------------------


class Down(nn.Module):
    def __init__(self, inputs: int, outputs: int, skips: list[Tensor]) -> None:
        super().__init__()
        self.conv, self.skips = conv(inputs, outputs), skips

    def forward(self, x: Tensor) -> Tensor:
        self.skips.append(F.relu(self.conv(x)))
        return F.max_pool2d(self.skips[-1], 2)


class Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, skips: list[Tensor]) -> None:
        super().__init__()
        self.conv, self.skips = conv(inputs, outputs), skips

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0)
        return F.relu(self.conv(torch.cat([x, self.skips.pop()], 1)))


def test_layers_that_share_a_list_still_share_it(tmp_path: Path) -> None:
    skips: list[Tensor] = []
    parts = Down(3, 8, skips), Down(8, 16, skips), Up(32, 8, skips), Up(16, 8, skips), conv(8, 2)
    unet = nn.Sequential(*parts).eval()
    before = unet(IMAGES)
    pruned = zoo.prune(unet, IMAGES, cf=2)
    assert pruned.pruning.plan.got == pytest.approx(2, rel=0.01)
    assert torch.equal(unet(IMAGES), before)
    assert pruned(IMAGES).shape == before.shape
    assert pruned[0].skips is pruned[3].skips
    assert pruned[0].skips is not skips
    for precision in ("fp32", "fp16"):
        file = tmp_path / f"{precision}.onnx"
        assert zoo.export(pruned, file, inputs=IMAGES, precision=precision).images == len(IMAGES)


@pytest.mark.parametrize("rewrite", [False, True])
def test_attributes_are_the_callers_objects_as_they_were(rewrite: bool) -> None:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        n.log.append(x)
        n.seen["last"].append(x)
        n.queue.append(x)
        return n.head(n.a(x).relu().mean((2, 3))) / n.config["temperature"]

    log: list[Tensor] = []
    config = {"temperature": 1.0}
    seen: dict[str, list[Tensor]] = {"last": []}
    module = Net(
        run, a=conv(3, 8), head=nn.Linear(8, 4), log=log, config=config, seen=seen, queue=deque()
    )
    queue = module.queue
    zoo.prune(module, IMAGES, cf=1.5, rewrite=rewrite)
    assert module.log is log
    assert module.config is config
    assert module.seen is seen
    assert module.queue is queue
    for held in (log, seen["last"], queue):
        assert {type(item) for item in held} == {Tensor}


def test_attributes_that_tracing_sets_are_gone() -> None:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        x = n.a(x).relu().mean((2, 3))
        if torch.compiler.is_exporting():
            n.shape = list(x.shape)
        return n.head(x)

    module = Net(run, a=conv(3, 8), head=nn.Linear(8, 4))
    zoo.prune(module, IMAGES, cf=1.5)
    assert "shape" not in vars(module)


def test_a_network_of_timm_has_the_same_key_after_it_was_traced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    module, x = timm.create_model("test_resnet").eval(), torch.rand(1, 3, 32, 32)
    key = trace_key(module, x)
    zoo.plan(module, x, cf=2, profile="equal")
    assert module.default_cfg is module.pretrained_cfg
    assert trace_key(module, x) == key


# --- functions in place of methods ----------------------------------------------------------------


def heated(build: Callable[[nn.Linear], Callable[..., Tensor]]) -> nn.Module:
    """A network whose last layer has a forward of its own."""
    module = net()
    module.head.forward = build(module.head)
    return module


def tempered(old: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return old(x) / 0.5


def linear(x: Tensor) -> Tensor:
    return HEADS[-1](x)


HEADS: list[nn.Module] = []


def over_a_global(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    HEADS.append(layer)
    return lambda x: linear(x) * 2


def over_its_method(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    old = layer.forward
    return lambda x: old(x) / 0.5


SHARED: dict[str, Callable[[nn.Linear], Callable[..., Tensor]]] = {
    "its old method": over_its_method,
    "a global": lambda layer: eval("lambda x: old(x) / 0.5", {"old": layer.forward}),
    "a function over a global": over_a_global,
    "the layer": lambda layer: lambda x: F.linear(x, layer.weight, layer.bias),
    "a weight among the defaults": lambda layer: lambda x, w=layer.weight: F.linear(x, w),
    "one by name": lambda layer: lambda x, *, old=layer.forward: old(x),
    "a list": lambda layer: (lambda parts: lambda x: F.linear(x, *parts))([layer.weight]),
    "a module around it": lambda layer: (
        lambda around: lambda x: F.linear(x, around[0].weight)
    )(nn.Sequential(layer)),
    "a function that a partial binds": lambda layer: partial(tempered, over_its_method(layer)),
    "a function that is bound": lambda layer: types.MethodType(
        lambda own, x: F.linear(x + own.bias.sum(), layer.weight), layer
    ),
}  # fmt: skip
"""What the forward of a layer refers to -> that forward."""


@pytest.mark.parametrize("name", SHARED)
def test_a_forward_over_parts_of_the_network_is_refused(name: str) -> None:
    with pytest.raises(GraphError, match="The Linear 'head' has a function, its 'forward', that"):
        zoo.prune(heated(SHARED[name]), IMAGES, cf=1.5)


def test_so_is_any_other_function_over_them() -> None:
    module = net(lambda n, x: n.again(x), c=conv(8, 8))
    module.again = lambda x: module.c(x).relu()
    with pytest.raises(GraphError, match="Net has a function, its 'again', that"):
        zoo.prune(module, IMAGES, cf=1.5)


OWN: dict[str, Callable[[nn.Linear], Callable[..., Tensor]]] = {
    "a method": lambda layer: types.MethodType(lambda s, x: F.linear(x, s.weight) * 2, layer),
    "a partial over the old method": lambda layer: partial(tempered, layer.forward),
    "a partial over the layer": lambda layer: partial(lambda s, x: F.linear(x, s.weight), layer),
    "the old method": lambda layer: layer.forward,
}
"""Forwards that a copy of the network has for itself."""


@pytest.mark.parametrize("name", OWN)
def test_a_forward_that_copies_with_the_network_is_pruned(name: str) -> None:
    module = heated(OWN[name])
    pruned = zoo.prune(module, IMAGES, cf=1.5)
    before = pruned(IMAGES)
    with torch.no_grad():
        module.head.weight.zero_()
    assert torch.equal(pruned(IMAGES), before)
    before.sum().backward()
    assert pruned.head.weight.grad is not None


def test_a_forward_over_no_part_of_the_network_is_pruned() -> None:
    scale, teacher = torch.tensor(2.0), nn.Linear(8, 8)
    module = net(lambda n, x: n.c(x), c=nn.Identity())
    module.c.forward = lambda x: x * scale + teacher.bias.sum()
    assert zoo.prune(module, IMAGES, cf=1.5).pruning.plan.got == pytest.approx(1.5, rel=0.05)


def test_hooks_of_accelerate_are_pruned() -> None:
    module = net()
    add_hook_to_module(module.head, ModelHook())
    assert zoo.prune(module, IMAGES, cf=1.5)(IMAGES).shape == (2, 4)


# --- tensors inside objects, and what cannot be copied --------------------------------------------


@dataclass
class Statistics:
    mean: Tensor
    last: object = None


class Mean:
    """An object of a class of one's own."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean


HOLDERS: dict[str, tuple[Callable[[Tensor], object], Callable[[Any], Tensor]]] = {
    "a dataclass": (Statistics, lambda held: held.mean),
    "a namespace": (lambda mean: types.SimpleNamespace(mean=mean), lambda held: held.mean),
    "an object": (Mean, lambda held: held.mean),
    "a queue": (lambda mean: deque([mean]), lambda held: held[0]),
    "a set": (lambda mean: {mean}, lambda held: next(iter(held))),
    "a partial": (lambda mean: partial(torch.neg, mean), lambda held: -held()),
}
"""What holds a tensor -> how it is made, and the tensor that it gives."""


@pytest.mark.parametrize("name", HOLDERS)
def test_a_tensor_inside_an_object_is_copied(name: str) -> None:
    make, mean_of = HOLDERS[name]
    mean = torch.full((3, 1, 1), 0.5)
    module = Net(
        lambda n, x: n.head(n.a(x - mean_of(n.held)).relu().mean((2, 3))),
        a=conv(3, 8), head=nn.Linear(8, 4), held=make(mean),
    )  # fmt: skip
    pruned = zoo.prune(module, IMAGES, cf=1.5)
    before = pruned(IMAGES)
    assert torch.equal(mean_of(pruned.held), mean)
    mean.zero_()
    assert torch.equal(pruned(IMAGES), before)
    assert mean_of(module.held) is mean or name == "a partial"


def test_an_output_kept_in_a_dataclass_is_the_callers_own() -> None:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        n.held.last = n.head(n.a(x).relu().mean((2, 3)))
        return n.held.last

    held = Statistics(torch.zeros(1))
    module = Net(run, a=conv(3, 8), head=nn.Linear(8, 4), held=held)
    module(IMAGES)
    zoo.prune(module, IMAGES, cf=1.5)
    assert module.held is held
    assert type(held.last) is Tensor


def test_an_optimizer_and_a_generator_are_copied() -> None:
    module = net()
    module.optimizer = torch.optim.Adam(module.parameters())
    module.generator = torch.Generator().manual_seed(5)
    module(IMAGES).sum().backward()
    module.optimizer.step()
    pruned = zoo.prune(module, IMAGES, cf=1.5)
    assert pruned.optimizer.param_groups[0]["params"][0] is pruned.a.weight
    assert pruned.generator.initial_seed() == 5
    assert pruned.generator is not module.generator


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (threading.Lock(), "cannot pickle '_thread.lock' object"),
        (Mean(param(3) * 2), "Only Tensors created explicitly"),
    ],
)
def test_an_attribute_that_cannot_be_copied_is_named(value: object, reason: str) -> None:
    module = net(lambda n, x: n.c(x), c=nn.Identity())
    module.c.cache = [value]
    expected = f"The Identity 'c' cannot be copied because of its attribute 'cache': {reason}"
    with pytest.raises(GraphError, match=expected):
        zoo.prune(module, IMAGES, cf=1.5)


def test_values_that_hold_themselves_are_copied() -> None:
    module = net()
    module.held = types.SimpleNamespace(again=[])
    module.held.again.append(module.held)
    pruned = zoo.prune(module, IMAGES, cf=1.5)
    assert pruned.held.again[0] is pruned.held
    assert pruned.held is not module.held


class Quantisable(nn.Module):
    """Written to be quantised: a residual block between stubs, added by a FloatFunctional."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 4)
        self.relu, self.add = nn.ReLU(), torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(self.quant(x)))
        x = self.add.add_relu(x, self.b(self.relu(self.a(x))))
        return self.dequant(self.head(x))


def test_a_network_that_is_to_be_quantised_prunes_and_is_quantised_then() -> None:
    torch.manual_seed(0)
    pruned = zoo.prune(Quantisable().eval(), IMAGES, cf=2)
    assert pruned.pruning.plan.got == pytest.approx(2, rel=0.1)
    expected = pruned(IMAGES)
    pruned.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(pruned)
    prepared(IMAGES)
    outputs = quantization.convert(prepared)(IMAGES)
    assert (outputs - expected).norm() < 0.05 * expected.norm()
