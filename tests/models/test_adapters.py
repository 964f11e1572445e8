"""Checkpoints of widespread public implementations give the outputs that their own networks give.

Each implementation is rewritten in tests/public_networks.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from public_networks import (
    DEEP,
    PLAIN,
    SEQUENTIAL,
    SMALL,
    Layers,
    inverted,
    projected,
    residual,
    vgg16,
)
from torch import Tensor, nn

import zoo
from zoo.errors import CheckpointError
from zoo.models import build_model, parameter_count
from zoo.models.adapters import adapted_names
from zoo.storage.dense import load_dense

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


# --- what each repository writes, and the architecture that it is ---------------------------------

Network = Callable[..., Tensor]

KUANGLIU = {"names": PLAIN, "shortcut": "shortcut", "classifier": "linear"}
WEIAICUNZAI = {"names": SEQUENTIAL, "shortcut": "shortcut", "classifier": "fc"}
HUYVNPHAN = {"names": PLAIN, "shortcut": "downsample", "classifier": "fc", "pool": True}


def head(hidden: int, *names: int) -> dict[str, int]:
    return {f"classifier.{n}": 10 if n == names[-1] else hidden for n in names}


CASES: dict[str, tuple[str, Network, dict]] = {
    "akamaster resnet20": ("resnet20", residual, {**KUANGLIU, **SMALL, "shortcut": None}),
    "akamaster resnet20, option B": ("resnet20-b", residual, {**KUANGLIU, **SMALL}),
    "chenyaofo, bearpaw resnet20": ("resnet20-b", residual, {**HUYVNPHAN, **SMALL, "pool": False}),
    "projections in every stage": (
        "resnet20-b1",
        residual,
        {**KUANGLIU, **SMALL, "everywhere": True},
    ),
    "kuangliu ResNet18": ("resnet18-cifar", residual, KUANGLIU),
    "kuangliu ResNet50": ("resnet50-cifar", residual, {**KUANGLIU, **DEEP}),
    "weiaicunzai resnet18": ("resnet18-cifar", residual, WEIAICUNZAI),
    "weiaicunzai resnet50": ("resnet50-cifar", residual, {**WEIAICUNZAI, **DEEP}),
    "huyvnphan resnet18": ("resnet18-cifar-maxpool", residual, HUYVNPHAN),
    "kuangliu, bearpaw vgg16_bn": (
        "vgg16_bn-cifar",
        vgg16,
        {"features": "features", "dense": {"classifier": 10}},
    ),
    "chenyaofo vgg16_bn": (
        "vgg16_bn-cifar-512",
        vgg16,
        {"features": "features", "dense": head(512, 0, 3, 6)},
    ),
    "chengyangfu vgg16_bn": (
        "vgg16_bn-cifar-512",
        vgg16,
        {"features": "features.module", "dense": head(512, 1, 4, 6)},
    ),
    "weiaicunzai vgg16_bn without its last dropout": (
        "vgg16_bn-cifar-4096",
        vgg16,
        {"features": "features", "dense": head(4096, 0, 3, 5)},
    ),
    "chenyaofo, huyvnphan mobilenet_v2": ("mobilenet_v2-cifar", inverted, {}),
    "kuangliu MobileNetV2": ("mobilenet_v2-cifar-projected", projected, {}),
}


@functools.lru_cache(3)
def theirs(case: str) -> tuple[str, dict[str, Tensor], Tensor, float]:
    """(architecture here, their state dict, their logits, their largest activation)."""
    arch, network, options = CASES[case]
    layers = Layers()
    logits = network(layers, IMAGES, **options)
    return arch, layers.state, logits, layers.largest


def logits_of(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module.double()(IMAGES)


@pytest.mark.parametrize("case", CASES)
def test_their_checkpoint_computes_here_what_it_computes_there(case):
    arch, state, expected, largest = theirs(case)
    dense = load_dense(arch, state)
    module = dense.module
    assert (dense.num_classes, dense.image_size) == (10, 32)
    assert len(module.state_dict()) == len(state)
    scale = expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * scale  # the images matter
    assert (logits_of(module) - expected).abs().max() < 1e-5 * scale
    assert largest > 6  # so that ReLU and ReLU6 differ


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "best_prec1": 91.7},
        lambda s: {"net": {f"module.{k}": v for k, v in s.items()}, "acc": 93.0, "epoch": 9},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "global_step": 9},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    ],
)
def test_their_wrappers_and_prefixes_come_off_first(wrapped, tmp_path):
    arch, state, expected, _ = theirs("akamaster resnet20")
    torch.save(wrapped(state), tmp_path / "model.th.pt")
    module = load_dense(arch, tmp_path / "model.th.pt").module
    torch.testing.assert_close(logits_of(module), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("member", "arch"), [("resnet18", "resnet18-cifar"), ("resnet50", "resnet50-cifar")]
)
def test_timms_networks_with_a_small_stem_are_ours(member, arch):
    timm = pytest.importorskip("timm")
    module = timm.create_model(member, num_classes=10)
    module.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    module.maxpool = nn.Identity()
    for name, tensor in module.state_dict().items():
        if "running" in name or "bn" in name:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    expected = logits_of(module.eval())
    ours = load_dense(arch, {k: v.float() for k, v in module.state_dict().items()}).module
    torch.testing.assert_close(logits_of(ours), expected, rtol=1e-5, atol=1e-5)


def lukemelas(squeezing: bool) -> Iterator[str]:
    """lukemelas writes a block's layers in the order of their use, as timm does, and counts on."""

    def layer(name: str, *parts: str) -> list[str]:
        return [f"_{name}.{part}" for part in parts]

    def norm(name: str) -> list[str]:
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        return layer(name, "weight", "bias", *statistics)

    yield from (*layer("conv_stem", "weight"), *norm("bn0"))
    for block in range(16):
        inner = []
        if block:
            inner += [*layer("expand_conv", "weight"), *norm("bn0")]
        inner += [*layer("depthwise_conv", "weight"), *norm("bn1")]
        for gate in ("se_reduce", "se_expand") if squeezing else ():
            inner += layer(gate, "weight", "bias")
        inner += [*layer("project_conv", "weight"), *norm("bn2")]
        yield from (f"_blocks.{block}.{name}" for name in inner)
    yield from (*layer("conv_head", "weight"), *norm("bn1"), *layer("fc", "weight", "bias"))


@pytest.mark.parametrize("member", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
def test_efficientnets_numbered_through_are_timms(member):
    timm = pytest.importorskip("timm")
    module = timm.create_model(member)
    for name, tensor in module.state_dict().items():
        if "running" in name:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    own = module.state_dict()
    names = list(lukemelas(squeezing="lite" not in member))
    state = dict(zip(names, own.values(), strict=True))
    ours = zoo.create_model(f"timm:{member}", 1000, pretrained=state)
    assert ours.state_dict().keys() == own.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, own[name]), name


def test_torchvisions_files_of_densenets_have_older_names():
    module = zoo.create_model("torchvision:densenet121", 7)
    own = {name: tensor for name, tensor in module.state_dict().items() if "batches" not in name}
    names = [re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name) for name in own]
    assert "features.denseblock1.denselayer1.norm.1.weight" in names
    ours = zoo.create_model(
        "torchvision:densenet121", 7, pretrained=dict(zip(names, own.values(), strict=True))
    ).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in own.items())


def test_pooling_in_the_stem_shows_in_no_key_so_it_has_an_architecture_of_its_own():
    arch, state, expected, _ = theirs("huyvnphan resnet18")
    other = load_dense(arch.removesuffix("-maxpool"), state).module
    assert (logits_of(other) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(
    "case", ["akamaster resnet20", "weiaicunzai resnet18", "kuangliu ResNet18"]
)
def test_the_wrong_architecture_is_answered_with_the_right_one(case):
    arch, state, *_ = theirs(case)
    with pytest.raises(CheckpointError, match=f"does not fit 'resnet20-b'.* fits '{arch}'"):
        load_dense("resnet20-b", state)


def test_a_shortcut_that_is_projected_or_not_names_the_variant():
    b1, b = (build_model(name, 10).state_dict() for name in ("resnet20-b1", "resnet20-b"))
    with pytest.raises(
        CheckpointError, match=r"12 unexpected: layer2.0.downsample.*'resnet20-b'\."
    ):
        load_dense("resnet20", b)
    with pytest.raises(
        CheckpointError, match=r"6 unexpected: layer1.0.downsample.*'resnet20-b1'\."
    ):
        load_dense("resnet20-b", b1)
    with pytest.raises(CheckpointError, match=r"10 missing: .*The checkpoint fits 'resnet20'\."):
        load_dense("resnet20-b", build_model("resnet20", 10).state_dict())


def test_half_a_checkpoint_is_counted_by_the_adapter_that_comes_nearest():
    arch, whole, *_ = theirs("weiaicunzai resnet18")
    state = {**whole, "extra.weight": torch.ones(1)}
    del state["conv5_x.1.residual_function.4.weight"]
    with pytest.raises(CheckpointError) as caught:
        load_dense(arch, state)
    message = str(caught.value)
    assert "1 missing: layer4.1.bn2.weight. 1 unexpected: extra.weight." in message
    assert "read as those of weiaicunzai/pytorch-cifar100" in message
    assert message.count("missing") == 1
    assert "no classifier" not in message


def test_preactivation_networks_are_refused():
    # kuangliu's PreActResNet18: the norm comes first, and the shortcut has none
    arch, state, *_ = theirs("kuangliu ResNet18")
    preact: Mapping[str, Tensor] = {
        name: tensor for name, tensor in state.items() if ".shortcut.1." not in name
    }
    with pytest.raises(CheckpointError, match=r"12 missing: layer2\.0\.downsample\.1\.weight"):
        load_dense(arch, preact)


def test_no_reading_merges_two_tensors():
    for adapter, names in adapted_names(
        ["fc.weight", "linear.weight", "layer2.0.shortcut.0.weight"]
    ):
        assert len(set(names.values())) == 3, adapter
    assert [adapter for adapter, _ in adapted_names(["fc.weight", "layer1.0.conv1.weight"])] == [""]


@pytest.mark.parametrize(
    "case", ["kuangliu ResNet18", "chenyaofo vgg16_bn", "kuangliu MobileNetV2"]
)
def test_their_checkpoint_is_pruned_in_one_line(case):
    arch, state, *_ = theirs(case)
    model = zoo.load(arch, 2, state, profile="equal")
    assert model.pruning.plan.got == pytest.approx(2, rel=0.02)
    assert parameter_count(model) < 0.55 * sum(tensor.numel() for tensor in state.values())
    assert model(IMAGES.float()).shape == (2, 10)
