"""The contract of surgery, and the groups, plans and criteria it rests on."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from helpers import macs_of, planned, traced
from torch import nn

import zoo
from zoo.criteria.scores import random_scores, taylor_features
from zoo.errors import FactorError, ZooError
from zoo.models import build_model, parameter_count
from zoo.planning.policies import POLICIES, policy_solution
from zoo.registry.store import stored_groups
from zoo.spec.cost import cost_model
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan, kept_positions, make_plan
from zoo.surgery import surgery
from zoo.surgery.masking import masked
from zoo.surgery.surgery import named_tensors
from zoo.tracing.contract import randomised
from zoo.tracing.graph import channel_groups

OWN = ("cnet", "resnet20-16", "resnet20-64")
OTHERS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:vgg16_bn",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
    "torchvision:efficientnet_b0",
    "timm:seresnet18",
)


def assert_contract(module: nn.Module, groups: ChannelGroups, plan: Plan, x: torch.Tensor) -> None:
    """Masked dense and pruned agree to 1e-9 in outputs and in every gradient that remains.

    As `zoo.tracing.contract.violation`, but the dense side is the module, not its traced program,
    and plans that leave too little for a gradient to flow are allowed.
    """
    pruned, zeroed = surgery.apply(module, groups, plan), masked(module, groups, plan)
    assert parameter_count(pruned) == plan.pruned.params
    outputs, gradients, inputs = [], [], []
    for net in (pruned, zeroed):
        images = x.clone().requires_grad_()
        out = net(images)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        outputs.append(out.detach())
        inputs.append(images.grad)
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    scale = max(1.0, outputs[1].abs().max().item())
    assert outputs[1].abs().max() > 0
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-9 * scale
    assert (inputs[0] - inputs[1]).abs().max() <= 1e-9 * max(1.0, inputs[1].abs().max().item())
    kept = kept_positions(groups, plan.kept)
    for name, gradient in gradients[1].items():
        for dim, index in kept.get(name, {}).items():
            gradient = gradient.index_select(dim, torch.from_numpy(index))
        bound = 1e-9 * max(1.0, gradient.abs().max().item())
        assert (gradients[0][name] - gradient).abs().max() <= bound, name


@pytest.mark.parametrize("name", [*OWN, *OTHERS])
@pytest.mark.parametrize("policy", POLICIES)
def test_surgery_computes_what_masking_computes(name: str, policy: str) -> None:
    module, x, groups = traced(name)
    plan = planned(module, groups, policy)
    assert plan.got == pytest.approx(plan.asked, rel=0.02)
    assert plan.pruned.params < plan.dense.params
    assert_contract(module, groups, plan, x)


@pytest.mark.parametrize("name", [*OWN, *OTHERS])
@pytest.mark.parametrize("criterion", ["l1", "taylor"])
def test_surgery_by_every_criterion(name: str, criterion: str) -> None:
    module, x, groups = traced(name)
    for policy in POLICIES:
        assert_contract(module, groups, planned(module, groups, policy, criterion), x)


@pytest.mark.parametrize("name", [*OWN, *OTHERS])
def test_every_layer_is_in_a_group_and_every_parameter_is_counted(name: str) -> None:
    module, _, groups = traced(name)
    assert not groups.unprunable
    assert cost_model(groups).dense.params == parameter_count(module)
    filters = {f for group in groups.groups for f in group.filters}
    layers = {n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    classifiers = {"fc", "classifier", "classifier.1", "classifier.2"}
    depthwise = {n for n, m in module.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert layers - {f.removesuffix(".weight") for f in filters} - depthwise <= classifiers


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cnet", (32,) * 6),
        ("resnet20-16", (16,) * 5 + (32,) * 4 + (128,) * 4),
        ("resnet20-64", (64,) * 5 + (128,) * 4 + (512,) * 4),
    ],
)
def test_decisions_are_the_papers(name: str, sizes: tuple[int, ...]) -> None:
    traced = channel_groups(build_model(name, 10), torch.zeros(1, 3, 32, 32))
    assert traced.sizes == sizes
    assert stored_groups(name) == traced


def test_stored_groups_fit_other_classes_and_sizes() -> None:
    for name, size in (("cnet", 16), ("resnet20-16", 16), ("resnet20-16", 64)):
        module = build_model(name, 37, image_size=size)
        shapes = {key: tuple(t.shape) for key, t in named_tensors(module).items()}
        stored = stored_groups(name)
        assert stored is not None
        assert stored.adapted(shapes, size) == channel_groups(module, torch.zeros(1, 3, size, size))


def test_macs_are_those_of_torch() -> None:
    module = build_model("torchvision:mobilenet_v2", 10).eval()
    x = torch.zeros(1, 3, 64, 64)
    groups = channel_groups(module, x)
    pruned = zoo.prune(module, x, cf=2, metric="macs")
    for net, macs in (
        (module, cost_model(groups).dense.macs),
        (pruned, pruned.pruning.plan.pruned.macs),
    ):
        assert macs_of(net, 64) == macs


class Hidden(nn.Module):
    """A width as a constant inside forward: no surgery can know it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x.view(x.shape[0], 8, x.shape[2], x.shape[3])
        return self.head(self.second(x).mean((2, 3)))


def test_a_width_hidden_as_a_constant_is_left_whole_and_reported() -> None:
    groups = channel_groups(Hidden(), torch.zeros(1, 3, 12, 12))
    assert groups.names == ("second",)
    assert "constant" in groups.unprunable["first"]


class Unruly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).topk(8, 1)[0].mean((2, 3))


def test_an_operator_without_a_rule_names_node_and_line() -> None:
    (reason,) = channel_groups(Unruly(), torch.zeros(1, 3, 8, 8)).unprunable.values()
    assert re.search(r"'topk', which has no rule, at node 'topk' of .*test_pruning\.py", reason)


def test_the_callers_module_is_left_alone() -> None:
    module = build_model("resnet20-16", 10).train()
    before = copy.deepcopy(module.state_dict())
    pruned = zoo.prune(module, torch.zeros(1, 3, 16, 16), cf=2)
    own = {t.untyped_storage().data_ptr() for t in named_tensors(module).values() if t.numel()}
    new = {t.untyped_storage().data_ptr() for t in named_tensors(pruned).values() if t.numel()}
    assert not own & new
    with torch.no_grad():
        for tensor in named_tensors(pruned).values():
            tensor.fill_(7)
    assert module.training
    assert not hasattr(module, "pruning")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_attributes_agree_with_tensors() -> None:
    pruned = zoo.prune(build_model("torchvision:mobilenet_v2", 10), torch.zeros(1, 3, 32, 32), cf=2)
    for layer in pruned.modules():
        if isinstance(layer, nn.Conv2d):
            expected = (layer.out_channels, layer.in_channels // layer.groups)
            assert tuple(layer.weight.shape[:2]) == expected
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.num_features == len(layer.weight)
    clone = copy.deepcopy(pruned)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(clone.eval()(x), pruned.eval()(x))


def test_random_choice_is_nested_and_depends_on_the_seed() -> None:
    groups = channel_groups(build_model("cnet", 10), torch.zeros(1, 3, 32, 32))

    def kept(width: int, seed: int) -> set[int]:
        widths = dict.fromkeys(groups.names, width)
        plan = make_plan(
            groups, widths, random_scores(groups, seed), profile="", metric="params", asked=1,
            criterion="random", seed=seed,
        )  # fmt: skip
        return set(plan.kept["conv3"])

    assert kept(8, 0) < kept(9, 0) < kept(20, 0)
    assert kept(8, 0) == kept(8, 0)
    assert kept(8, 0) != kept(8, 1)


def test_l1_keeps_the_filters_of_largest_norm() -> None:
    module = randomised(build_model("cnet", 5))
    groups = channel_groups(module, torch.zeros(1, 3, 32, 32).double())
    plan = planned(module, groups, "equal", "l1")
    norms = module.conv2.weight.detach().abs().sum((1, 2, 3))
    width = len(plan.kept["conv2"])
    assert set(plan.kept["conv2"]) == set(norms.topk(width).indices.tolist())


def test_taylor_features_are_the_formula() -> None:
    module = randomised(build_model("cnet", 5))
    groups = channel_groups(module, torch.zeros(1, 3, 32, 32).double())
    images, labels = torch.rand(6, 3, 32, 32).double(), torch.arange(6) % 5
    features = taylor_features(module, groups, [(images[:2], labels[:2]), (images[2:], labels[2:])])
    expected = torch.zeros(32).double()
    for image, label in zip(images, labels, strict=True):
        x = module.relu(module.conv1(image[None]))
        out = module.conv2(x).detach().requires_grad_()
        x = module.pool(module.relu(out.clone()))
        x = module.pool(module.relu(module.conv4(module.relu(module.conv3(x)))))
        x = module.pool(module.relu(module.conv6(module.relu(module.conv5(x)))))
        loss = nn.functional.cross_entropy(module.fc(x.flatten(1)), label[None])
        (gradient,) = torch.autograd.grad(loss, out)
        expected += (gradient * out).abs().mean((0, 2, 3)).detach() / 6
    assert torch.allclose(features[1].double(), expected, rtol=1e-5)


def test_criteria_that_need_data_say_so() -> None:
    module = build_model("cnet", 10)
    with pytest.raises(ZooError, match="needs data"):
        zoo.prune(module, torch.zeros(1, 3, 32, 32), cf=2, criterion="taylor")
    with pytest.raises(ZooError, match=r"Did you mean 'taylor'"):
        zoo.prune(module, torch.zeros(1, 3, 32, 32), cf=2, criterion="tailor")


@pytest.mark.parametrize("policy", ["equal", "random", "greedy"])
@pytest.mark.parametrize("metric", ["params", "macs"])
@pytest.mark.parametrize("cf", [2.0, 4.0, 6.0])
def test_policies_meet_the_factor(policy: str, metric: str, cf: float) -> None:
    for name in ("resnet20-16", "cnet"):
        groups = stored_groups(name)
        assert groups is not None
        model = cost_model(groups)
        solution = policy_solution(policy, model, cf, metric)
        assert solution.got == pytest.approx(cf, rel=0.02), name
        assert model.factor(solution.widths, metric) == solution.got


def test_an_unreachable_factor_names_the_range() -> None:
    with pytest.raises(FactorError, match=r"reaches .* to"):
        zoo.prune(build_model("cnet", 10), torch.zeros(1, 3, 32, 32), cf=5, profile="decreasing")


def test_increasing_and_decreasing_are_lines() -> None:
    groups = stored_groups("resnet20-16")
    assert groups is not None
    up = policy_solution("increasing", cost_model(groups), 2).keep_ratios
    assert up[0] == 1
    steps = [a - b for a, b in itertools.pairwise(up)]
    assert all(step == pytest.approx(steps[0], abs=0.04) and step > 0 for step in steps)
    down = policy_solution("decreasing", cost_model(groups), 1.1).keep_ratios
    assert down[-1] == 1
    assert list(down) == sorted(down)
