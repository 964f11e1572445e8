"""Networks of any input and any output: what they return keeps its shape, all of it is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from odd import IMAGES, Net, cut, halves
from odd_calls import CALLS, SIGNAL, STRUCTURES, fused, fused_parts, two_heads
from torch import nn
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import DataError, GraphError
from zoo.planning.latency import latency_table
from zoo.tracing.calls import leaves
from zoo.tracing.contract import randomised, violation
from zoo.tracing.graph import analyse, channel_groups


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
