"""Every criterion against its formula, worked out again on networks small enough to do it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zoo
from zoo.criteria.filter_agent import FilterAgent, reinforce_scores
from zoo.criteria.scores import CRITERIA, Criterion, channel_scores
from zoo.errors import GraphError, ZooError
from zoo.models import build_model
from zoo.spec.groups import ChannelGroups, Group, Slot
from zoo.surgery.surgery import named_tensors
from zoo.tracing.graph import channel_groups


@pytest.fixture(autouse=True)
def _short_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    short = functools.partial(reinforce_scores, settings=FilterAgent(updates=2, samples=2))
    monkeypatch.setitem(CRITERIA, "reinforce", Criterion(short, needs_data=True))


class Tiny(nn.Module):
    """Two convolutions with batch norm, of 4 and 6 channels, and 3 classes; in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 4, 3)

    def inner(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn1(self.conv1(x)))

    def outer(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(functional.relu(self.bn2(x)), 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.outer(self.conv2(self.inner(x))))


class Twice(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.again(functional.relu(self.stem(x))))
        return self.fc(functional.relu(self.again(x)).mean((2, 3)))


def drawn(module: nn.Module) -> nn.Module:
    """`module` in double precision and eval mode, with no tensor at its initial value."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in named_tensors(module).items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator) - 0.5
            tensor.data.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise)
    return module.double().eval()


GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.rand(6, 3, 6, 6, generator=GENERATOR).double()
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
BATCHES = [(IMAGES[:2], LABELS[:2]), (IMAGES[2:], LABELS[2:])]


@functools.cache
def tiny() -> tuple[Tiny, ChannelGroups]:
    module = drawn(Tiny())
    assert isinstance(module, Tiny)
    return module, channel_groups(module, IMAGES[:1])


def scored(name: str) -> list[Tensor]:
    """The scores of `conv1` and `conv2` of the tiny network."""
    module, groups = tiny()
    assert groups.names == ("conv1", "conv2")
    return [torch.tensor(s).double() for s in channel_scores(name, module, groups, 0, BATCHES)]


def gradients(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    module = copy.deepcopy(tiny()[0])
    functional.cross_entropy(module(images), labels).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def of_units(values: dict[str, Tensor]) -> list[Tensor]:
    """`values` summed over the parameters of each channel: its filter, batch norm and readers."""
    first = values["conv1.weight"].sum((1, 2, 3)) + values["conv2.weight"].sum((0, 2, 3))
    second = values["conv2.weight"].sum((1, 2, 3)) + values["fc.weight"].view(3, 6, 4).sum((0, 2))
    for name in ("conv{}.bias", "bn{}.weight", "bn{}.bias"):
        first = first + values[name.format(1)]
        second = second + values[name.format(2)]
    return [first, second]


def assert_scores(name: str, *expected: Tensor) -> None:
    for got, wanted in zip(scored(name), expected, strict=True):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("l1", lambda w: w.abs().sum((1, 2, 3))),
        ("l2", lambda w: (w * w).sum((1, 2, 3)).sqrt()),
        ("fpgm", lambda w: torch.stack([sum((a - b).norm() for b in w) for a in w])),
    ],
)
def test_norms_and_distances_of_filters(name: str, formula: Callable[[Tensor], Tensor]) -> None:
    module, _ = tiny()
    assert_scores(name, formula(module.conv1.weight), formula(module.conv2.weight))


def test_bn_scale_is_gamma_and_names_a_group_without_one() -> None:
    module, _ = tiny()
    assert_scores("bn_scale", module.bn1.weight.abs(), module.bn2.weight.abs())
    with pytest.raises(GraphError, match=r"'bn_scale' needs a batch norm.*'conv1'"):
        zoo.prune(build_model("cnet", 3), torch.zeros(1, 3, 32, 32), cf=2, criterion="bn_scale")


def test_taylor_weight_is_the_square_of_gradient_times_weight() -> None:
    module, _ = tiny()
    values: dict[str, Tensor] = {}
    for images, labels in BATCHES:
        for name, gradient in gradients(images, labels).items():
            term = (gradient * module.get_parameter(name)).square() * len(labels) / 6
            values[name] = values.get(name, 0) + term
    assert_scores("taylor_weight", *of_units(values))


def test_obd_is_half_the_mean_squared_gradient_of_single_images() -> None:
    module, _ = tiny()
    values: dict[str, Tensor] = {}
    for image, label in zip(IMAGES, LABELS, strict=True):
        for name, gradient in gradients(image[None], label[None]).items():
            term = gradient.square() * module.get_parameter(name).square() / 2 / 6
            values[name] = values.get(name, 0) + term
    assert_scores("obd", *of_units(values))


def test_snip_is_the_gradient_on_all_images_times_the_weight() -> None:
    module, _ = tiny()
    of_all = gradients(IMAGES, LABELS)
    products = [
        (of_all[n] * module.get_parameter(n)).abs() for n in ("conv1.weight", "conv2.weight")
    ]
    assert_scores("snip", *(product.sum((1, 2, 3)) for product in products))


def test_fisher_is_half_the_squared_derivative_of_a_gate() -> None:
    module, _ = tiny()
    total = [torch.zeros(4).double(), torch.zeros(6).double()]
    for image, label in zip(IMAGES, LABELS, strict=True):
        gates = [torch.ones(1, n, 1, 1).double().requires_grad_() for n in (4, 6)]
        x = functional.relu(module.bn1(module.conv1(image[None]) * gates[0]))
        logits = module.fc(module.outer(module.conv2(x) * gates[1]))
        loss = functional.cross_entropy(logits, label[None])
        for sums, derivative in zip(total, torch.autograd.grad(loss, gates), strict=True):
            sums += derivative.flatten().square() / 2 / 6
    assert_scores("fisher", *total)


def test_taylor_sums_over_the_calls_of_a_layer() -> None:
    module = drawn(Twice())
    slots = (Slot("again.weight", 0), Slot("again.weight", 1), Slot("again.bias", 0))
    group = Group("again", 4, slots, ("again.weight",))
    groups = ChannelGroups((group,), {}, (), {}, 6)
    first = module.again(functional.relu(module.stem(IMAGES)))
    second = module.again(functional.relu(first))
    logits = module.fc(functional.relu(second).mean((2, 3)))
    loss = functional.cross_entropy(logits, LABELS, reduction="sum")
    expected = sum(
        (gradient * output).abs().mean((2, 3)).sum(0) / 6
        for output, gradient in zip(
            (first, second), torch.autograd.grad(loss, (first, second)), strict=True
        )
    )
    (scores,) = channel_scores("taylor", module, groups, 0, BATCHES)
    torch.testing.assert_close(torch.tensor(scores).double(), expected.detach(), rtol=1e-5, atol=0)


def test_synflow_is_the_flow_through_each_channel_in_and_out() -> None:
    """Tanaka et al. prove that what enters a channel leaves it; without biases it is the flow."""
    module, _ = tiny()
    total = copy.deepcopy(module)
    for name, tensor in named_tensors(total).items():
        tensor.data = tensor.data.abs()
        if name.endswith(("bias", "running_mean")):
            tensor.data.zero_()
    image = torch.ones(1, 3, 6, 6).double()
    inner = total.inner(image).detach().requires_grad_()
    outer = total.outer(total.conv2(inner)).detach().requires_grad_()
    total.fc(total.outer(total.conv2(inner))).sum().backward()
    assert inner.grad is not None
    entering = (inner * inner.grad).sum((0, 2, 3))
    leaving = (outer * total.fc.weight.sum(0)).view(6, 4).sum(1)
    assert_scores("synflow", entering, leaving)


def test_apoz_is_the_share_that_is_not_zero_where_a_channel_is_read() -> None:
    module, _ = tiny()
    inner = module.inner(IMAGES)
    outer = module.outer(module.conv2(inner)).view(6, 6, 4)
    assert_scores("apoz", (inner != 0).double().mean((0, 2, 3)), (outer != 0).double().mean((0, 2)))


def test_apoz_without_zeros_is_an_error() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    with pytest.raises(ZooError, match="counts zeros"):
        channel_scores("apoz", network, channel_groups(network, IMAGES[:1]), 0, BATCHES)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_changes_nothing(name: str) -> None:
    module, groups = copy.deepcopy(tiny()[0]), tiny()[1]
    module.train()
    module.bn1.eval()
    module.conv1.weight.requires_grad_(False)
    given = module.fc.bias.grad = torch.ones(3).double()
    before = copy.deepcopy(module)
    scores = channel_scores(name, module, groups, 0, BATCHES)
    assert scores == channel_scores(name, module, groups, 0, BATCHES)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[key]), key
    for old, new in zip(before.modules(), module.modules(), strict=True):
        assert old.training == new.training
        assert not new._forward_hooks
        assert not new._forward_pre_hooks
    for key, parameter in module.named_parameters():
        assert parameter.requires_grad == (key != "conv1.weight")
        assert parameter.grad is (given if key == "fc.bias" else None)


@pytest.mark.parametrize("name", [name for name in CRITERIA if CRITERIA[name].needs_data])
def test_a_criterion_that_needs_data_says_so(name: str) -> None:
    module, groups = tiny()
    with pytest.raises(ZooError, match=f"{name!r} needs data"):
        channel_scores(name, module, groups, 0, None)
    with pytest.raises(ZooError, match="no batches"):
        channel_scores(name, module, groups, 0, [])


@pytest.mark.parametrize("arch", ["resnet20-16", "cnet", "torchvision:mobilenet_v2"])
def test_every_criterion_ranks_the_channels_of_real_networks(arch: str) -> None:
    network = build_model(arch, 5, image_size=16)
    groups = channel_groups(network, torch.zeros(1, 3, 16, 16))
    batches = [(torch.rand(4, 3, 16, 16, generator=GENERATOR), torch.arange(4) % 5)]
    for name in CRITERIA:
        if (name, arch) == ("bn_scale", "cnet"):
            continue
        scores = [torch.tensor(row) for row in channel_scores(name, network, groups, 0, batches)]
        assert tuple(map(len, scores)) == groups.sizes, name
        assert all(torch.isfinite(row).all() for row in scores), name
        # not even bounded activations, as ReLU6, stop the flow
        assert name != "synflow" or min(map(min, scores)) > 0
        # fresh batch norms all have a scale of one
        assert name == "bn_scale" or any(len(row.unique()) > len(row) / 2 for row in scores), name
