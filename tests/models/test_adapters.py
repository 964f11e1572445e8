"""Checkpoints of widespread public implementations give the outputs that their own networks give.

Each implementation is rewritten here as a plain function of images, with its key names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.errors import CheckpointError, GraphError
from zoo.models import build_model
from zoo.models.adapters import adapted_names
from zoo.storage.dense import load_dense

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


class Layers:
    """Layers by name, whose random tensors come into being, as `state`, when they are first used.

    `largest` is the largest activation: 6 and more shows what ReLU6 clips.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.largest = 0.0
        self._generator = torch.Generator().manual_seed(1)

    def _tensor(self, name: str, *shape: int, mean: float = 0.0, sd: float = 0.1) -> Tensor:
        self.state[name] = mean + sd * torch.randn(shape, generator=self._generator)
        return self.state[name].double()

    def conv(
        self,
        x: Tensor,
        name: str,
        channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> Tensor:
        fan_in = x.shape[1] // groups * kernel**2
        shape = (channels, x.shape[1] // groups, kernel, kernel)
        weight = self._tensor(f"{name}.weight", *shape, sd=(2 / fan_in) ** 0.5)
        offset = self._tensor(f"{name}.bias", channels) if bias else None
        return F.conv2d(x, weight, offset, stride, kernel // 2, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        count = x.shape[1]
        weight = self._tensor(f"{name}.weight", count, mean=1.0)
        bias = self._tensor(f"{name}.bias", count)
        mean = self._tensor(f"{name}.running_mean", count)
        variance = self._tensor(f"{name}.running_var", count, mean=1.0)
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)
        return F.batch_norm(x, mean, variance, weight, bias)

    def relu(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, float(x.max()))
        return F.relu(x)

    def relu6(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, float(x.max()))
        return F.relu6(x)

    def dense(self, x: Tensor, name: str, outputs: int) -> Tensor:
        weight = self._tensor(f"{name}.weight", outputs, x.shape[1], sd=x.shape[1] ** -0.5)
        return F.linear(x, weight, self._tensor(f"{name}.bias", outputs))


# --- residual networks ----------------------------------------------------------------------------

PLAIN = {
    "stem": ("conv1", "bn1"),
    "stage": "layer{}",
    "block": [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")],
}
SEQUENTIAL = {
    "stem": ("conv1.0", "conv1.1"),
    "stage": "conv{}_x",
    "block": [(f"residual_function.{n}", f"residual_function.{n + 1}") for n in (0, 3, 6)],
}


def residual(
    layers: Layers,
    x: Tensor,
    *,
    names: dict,
    shortcut: str | None,
    classifier: str,
    width: int = 64,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    bottleneck: bool = False,
    pool: bool = False,
    everywhere: bool = False,
) -> Tensor:
    """A residual network; without a `shortcut`'s name the new channels are zeros on both sides."""
    first_stage = 1 if names is PLAIN else 2
    x = layers.relu(layers.norm(layers.conv(x, names["stem"][0], width, 3), names["stem"][1]))
    if pool:
        x = F.max_pool2d(x, 3, 2, padding=1)
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        outer = 4 * inner if bottleneck else inner
        for block in range(count):
            at = f"{names['stage'].format(stage + first_stage)}.{block}"
            stride = 2 if stage and not block else 1
            plan = [(inner, 1), (inner, 3), (outer, 1)] if bottleneck else [(inner, 3), (outer, 3)]
            out = x
            for n, ((channels, kernel), (conv, norm)) in enumerate(
                zip(plan, names["block"], strict=False)
            ):
                own = stride if n == (1 if bottleneck else 0) else 1
                out = layers.norm(
                    layers.conv(out, f"{at}.{conv}", channels, kernel, own), f"{at}.{norm}"
                )
                out = out if n == len(plan) - 1 else layers.relu(out)
            if stride == 2 or x.shape[1] != outer or (everywhere and not block):
                if shortcut is None:
                    new = (outer - x.shape[1]) // 2
                    zeros = x.new_zeros(len(x), new, *out.shape[2:])
                    x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
                else:
                    x = layers.conv(x, f"{at}.{shortcut}.0", outer, 1, stride)
                    x = layers.norm(x, f"{at}.{shortcut}.1")
            x = layers.relu(out + x)
    return layers.dense(F.avg_pool2d(x, x.shape[-1]).flatten(1), classifier, 10)


SMALL = {"names": PLAIN, "width": 16, "blocks": (3, 3, 3)}
DEEP = {"bottleneck": True, "blocks": (3, 4, 6, 3)}


# --- plain and depthwise networks -----------------------------------------------------------------


def vgg16(layers: Layers, x: Tensor, *, features: str, dense: dict[str, int]) -> Tensor:
    index = 0
    for widths in ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3):
        for channels in widths:
            x = layers.conv(x, f"{features}.{index}", channels, 3, bias=True)
            x = layers.relu(layers.norm(x, f"{features}.{index + 1}"))
            index += 3
        x, index = F.max_pool2d(x, 2), index + 1
    x = x.flatten(1)
    *hidden, last = dense
    for name in hidden:
        x = layers.relu(layers.dense(x, name, dense[name]))
    return layers.dense(x, last, dense[last])


SETTING = [
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def inverted(layers: Layers, x: Tensor) -> Tensor:
    """torchvision's key names: of a block with an expansion, and of the one without."""
    step = lambda y, name, *shape, **more: layers.relu6(  # noqa: E731
        layers.norm(layers.conv(y, f"{name}.0", *shape, **more), f"{name}.1")
    )
    x, index = step(x, "features.0", 32, 3), 1
    for expansion, channels, count, first in SETTING:
        for block in range(count):
            at, stride = f"features.{index}.conv", 1 if block else first
            out, n = x, 0
            if expansion > 1:
                out, n = step(out, f"{at}.0", 6 * x.shape[1], 1), 1
            wide = out.shape[1]
            out = step(out, f"{at}.{n}", wide, 3, stride=stride, groups=wide)
            out = layers.norm(layers.conv(out, f"{at}.{n + 1}", channels, 1), f"{at}.{n + 2}")
            x = x + out if x.shape == out.shape else out
            index += 1
    x = step(x, f"features.{index}", 1280, 1)
    return layers.dense(x.mean((2, 3)), "classifier.1", 10)


def projected(layers: Layers, x: Tensor) -> Tensor:
    """kuangliu's key names, ReLU, an expansion in every block and projected shortcuts."""
    x = layers.relu(layers.norm(layers.conv(x, "conv1", 32, 3), "bn1"))
    index = 0
    for expansion, channels, count, first in SETTING:
        for block in range(count):
            at, stride = f"layers.{index}", 1 if block else first
            wide = expansion * x.shape[1]
            out = layers.relu(layers.norm(layers.conv(x, f"{at}.conv1", wide, 1), f"{at}.bn1"))
            out = layers.conv(out, f"{at}.conv2", wide, 3, stride, groups=wide)
            out = layers.relu(layers.norm(out, f"{at}.bn2"))
            out = layers.norm(layers.conv(out, f"{at}.conv3", channels, 1), f"{at}.bn3")
            if stride == 1 and x.shape[1] != channels:
                x = layers.conv(x, f"{at}.shortcut.0", channels, 1)
                x = layers.norm(x, f"{at}.shortcut.1")
            x = out + x if stride == 1 else out
            index += 1
    x = layers.relu(layers.norm(layers.conv(x, "conv2", 1280, 1), "bn2"))
    return layers.dense(F.avg_pool2d(x, 4).flatten(1), "linear", 10)


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
    assert sum(p.numel() for p in model.parameters()) < 0.55 * sum(
        tensor.numel() for tensor in state.values()
    )
    assert model(IMAGES.float()).shape == (2, 10)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_classifiers_of_inner_layers_are_left_out() -> None:
    theirs = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    ours = zoo.load("torchvision:googlenet", 2, theirs.state_dict(), profile="equal")
    assert not [name for name, _ in ours.named_parameters() if name.startswith("aux")]
    assert ours.train()(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(GraphError, match=r"'aux1\..*no part in eval mode"):
        zoo.prune(theirs, torch.rand(1, 3, 64, 64), cf=2)


def test_a_classifier_may_be_a_convolution() -> None:
    theirs = torchvision.models.squeezenet1_1(num_classes=5).eval()
    images = torch.rand(2, 3, 64, 64)
    ours = zoo.create_model("torchvision:squeezenet1_1", 5, pretrained=theirs.state_dict())
    assert torch.equal(ours.eval()(images), theirs(images))
    pruned = zoo.load("torchvision:squeezenet1_1", 2, theirs, profile="equal")
    assert pruned(images).shape == (2, 5)
