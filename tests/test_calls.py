"""Networks of any input and any output: what they return keeps its shape, all of it is compared."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from odd import IMAGES, Net, conv, cut, halves, net
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import DataError, GraphError
from zoo.planning.latency import latency_table
from zoo.tracing.calls import leaves
from zoo.tracing.contract import randomised, violation
from zoo.tracing.graph import analyse, channel_groups

Pair = namedtuple("Pair", "maps logits")


@dataclass
class Heads:
    maps: Tensor
    more: dict[str, list[Tensor]]


STRUCTURES = {
    "tuple": lambda maps, logits: (maps, logits),
    "nested list": lambda maps, logits: [[maps], [logits, [logits * 2]]],
    "dict": lambda maps, logits: {"maps": maps, "logits": logits},
    "ordered dict": lambda maps, logits: OrderedDict(logits=logits, maps=maps),
    "named tuple": lambda maps, logits: Pair(maps, logits),
    "dataclass": lambda maps, logits: Heads(maps, {"all": [logits]}),
    "beside no tensors": lambda maps, logits: (maps, None, 3, "why", logits),
}


def two_heads(structure: str) -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> object:
        maps = n.b(n.a(x).relu())
        return STRUCTURES[structure](n.c(maps), n.head(maps.mean((2, 3))))

    return Net(run, a=conv(3, 8), b=conv(8, 6), c=conv(6, 4), head=nn.Linear(6, 5))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_outputs_of_any_structure_keep_their_shapes(structure: str, tmp_path: Path) -> None:
    pruned = cut(lambda: two_heads(structure), tmp_path)
    assert list(pruned.pruning.plan.kept) == ["a", "b"]
    assert pruned.pruning.num_classes == 0
    dense = two_heads(structure).double()(IMAGES.double())
    got = pruned(IMAGES.double())
    assert type(got) is type(dense)
    assert [t.shape for t in leaves(got)] == [t.shape for t in leaves(dense)]


def test_every_output_is_compared() -> None:
    """The contract sees a difference in any of them, in their number and in their structure."""
    module = randomised(two_heads("dict"))
    x = IMAGES.double()
    program, groups = analyse(module, x)
    plan = zoo.prune(module, x, profile=halves(groups)).pruning.plan
    assert violation(module, program, groups, plan, x) < 1e-9
    forward = module.run
    for changed in (
        lambda n, x: forward(n, x) | {"logits": forward(n, x)["logits"] * 1.01},
        lambda n, x: {"maps": forward(n, x)["maps"]},
        lambda n, x: forward(n, x) if len(n.a.weight) == 8 else tuple(forward(n, x).values()),
    ):
        module.run = changed
        assert violation(module, program, groups, plan, x) > 1e-3


def test_a_feature_extractor_keeps_the_widths_that_it_returns(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 32, 32)
    build = lambda: timm.create_model("resnet18", features_only=True, out_indices=(1, 4))  # noqa: E731
    pruned = cut(build, tmp_path, x)
    assert [f.shape[1] for f in pruned(x.double())] == [64, 512]
    assert pruned.pruning.plan.got > 1.5


@pytest.mark.slow
def test_a_segmentation_network_of_torchvision(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=3
        )

    x = torch.rand(1, 3, 64, 64)
    module = build().eval()
    pruned = zoo.prune(module, x, profile=halves(channel_groups(module, x)))
    assert {k: v.shape for k, v in pruned(x).items()} == {"out": (1, 3, 64, 64)}
    zoo.save(pruned, tmp_path / "pruned")
    again = zoo.load_pruned(tmp_path / "pruned", skeleton=build())
    assert torch.equal(again(x)["out"], pruned(x)["out"])


# --- inputs ---------------------------------------------------------------------------------------


def volume(kind: int) -> nn.Module:
    """A small network of convolutions in `kind` dimensions."""
    conv_n, norm, pool = (
        getattr(nn, f"{name}{kind}d") for name in ("Conv", "BatchNorm", "AdaptiveAvgPool")
    )
    return nn.Sequential(
        conv_n(2, 12, 3, padding=1), norm(12), nn.ReLU(), conv_n(12, 8, 3, groups=4), nn.ReLU(),
        pool(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def fused(n: nn.Module, image: Tensor, signal: Tensor) -> Tensor:
    both = torch.cat([n.a(image).relu().mean((2, 3)), n.s(signal).relu().mean(2)], 1)
    return n.head(both)


def fused_parts() -> dict[str, nn.Module]:
    return {"a": conv(3, 8), "s": nn.Conv1d(1, 6, 5), "head": nn.Linear(14, 4)}


class Named(nn.Module):
    """Images and, by name alone, a table's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 4)
        self.table = nn.Embedding(5, 8)

    def forward(self, image: Tensor, *, position: Tensor, scale: float = 1.0) -> Tensor:
        rows = self.table(position)[..., None, None] * scale
        return self.head((self.b(self.a(image).relu()) + rows).mean((2, 3)))


class Batch(nn.Module):
    """One argument, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 4)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = self.b(self.a(batch["image"]).relu()) * batch["mask"]
        return {"logits": self.head(maps.mean((2, 3)))}


SIGNAL = torch.rand(2, 1, 16)
CALLS: dict[str, tuple] = {
    "1-d": (lambda: volume(1), torch.rand(2, 2, 16), "0 3"),
    "3-d": (lambda: volume(3), torch.rand(2, 2, 5, 6, 7), "0 3"),
    "tuple": (lambda: Net(fused, **fused_parts()), (IMAGES, SIGNAL), "a s"),
    "a list": (lambda: Net(fused, **fused_parts()), [IMAGES, SIGNAL], "a s"),
    "names": (Named, {"position": torch.tensor([1, 3]), "image": IMAGES}, "a b"),
    "one dict": (Batch, {"image": IMAGES, "mask": torch.ones(2, 1, 8, 8)}, "a b"),
    "oblong": (net, torch.rand(2, 3, 4, 12), "a b"),
}  # fmt: skip
"""Name -> the network, what it is called with, and its groups."""


@pytest.mark.parametrize("name", CALLS)
def test_inputs_of_any_kind(name: str, tmp_path: Path) -> None:
    build, inputs, groups = CALLS[name]
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    pruned = cut(build, tmp_path, inputs)
    assert list(pruned.pruning.plan.kept) == groups.split()
    again = zoo.load_pruned(tmp_path / "pruned", skeleton=build())
    assert again.pruning == pruned.pruning  # its inputs with it


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("metric", ["params", "macs"])
def test_factors_of_networks_of_any_input(name: str, metric: str) -> None:
    build, inputs, _ = CALLS[name]
    plan = zoo.plan(build(), inputs, cf=1.3, metric=metric, criterion="synflow")
    assert plan.got > 1.1
    assert any(width < 8 for width in plan.widths.values())


@pytest.mark.parametrize("name", CALLS)
def test_latency_is_of_the_inputs_that_were_given(name: str) -> None:
    build, inputs, groups = CALLS[name]
    module, inputs = build(), tuple(inputs) if isinstance(inputs, list) else inputs
    traced = channel_groups(module, inputs)
    shapes: list[torch.Size] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.extend(t.shape for t in leaves((args, kwargs))),
        with_kwargs=True,
    )
    table = latency_table(module, traced)
    layers = {layer.weight.removesuffix(".weight") for layer in table.layers}
    assert layers >= set(groups.split())
    assert {*map(tuple, shapes)} == {(1, *t.shape[1:]) for t in leaves(inputs)}


def test_macs_are_of_one_item_of_the_first_input() -> None:
    one, two = ((IMAGES[:n], SIGNAL[:n]) for n in (1, 2))
    module = Net(fused, **fused_parts())
    assert zoo.plan(module, one, cf=1).dense == zoo.plan(module, two, cf=1).dense


BAD = {
    "nothing": ((), r"whatever tensor, tuple or dict of tensors .*got tuple"),
    "text": ("image.png", "got str"),
    "an array in a tuple": ((IMAGES, IMAGES.numpy()), r"got \[\(2, 3, 8, 8\) of float32, ndarray"),
    "an empty batch": (IMAGES[:0], r"none of them empty; got \(0, 3, 8, 8\)"),
    "one too few": ((IMAGES,), r"does not run on .*\[\(2, 3, 8, 8\) of float32\]: .*signal"),
    "another name": ({"picture": IMAGES, "signal": SIGNAL}, r"does not run on .*'picture': \(2, 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_a_network_does_not_take_are_named(name: str) -> None:
    inputs, message = BAD[name]
    with pytest.raises(GraphError, match=message):
        zoo.prune(Net(fused, **fused_parts()), inputs, cf=2)


def test_what_needs_logits_of_images_says_so() -> None:
    data = TensorDataset(torch.rand(4, 3, 8, 8), torch.randint(0, 4, (4,)))
    heads = zoo.prune(two_heads("dict"), IMAGES, cf=2)
    for needing in (
        lambda: zoo.evaluate(heads, data),
        lambda: zoo.finetune(heads, data, data),
        lambda: zoo.prune(two_heads("dict"), IMAGES, cf=2, criterion="taylor", data=data),
    ):
        with pytest.raises(DataError, match=r"logits .* gives dict of maps, logits\. Wrap it"):
            needing()
    several = zoo.prune(Net(fused, **fused_parts()), (IMAGES, SIGNAL), cf=1.2)
    for needing in (lambda: zoo.evaluate(several, data), lambda: zoo.finetune(several, data, data)):
        with pytest.raises(DataError, match=r"does not run on images .*: .*'signal'"):
            needing()
