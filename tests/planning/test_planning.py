"""What a request becomes: aligned widths, pinned groups, and clear words where both conflict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zoo
from zoo.errors import FactorError, ZooError
from zoo.models import build_model
from zoo.planning.policies import policy_solution
from zoo.planning.solver import Limits
from zoo.registry.store import stored_groups
from zoo.spec.cost import cost_model

IMAGES = torch.zeros(1, 3, 32, 32)


def model_of(name: str):
    groups = stored_groups(name)
    assert groups is not None
    return cost_model(groups)


@given(
    name=st.sampled_from(["cnet", "resnet20-16", "resnet20-64"]),
    policy=st.sampled_from(["equal", "random", "greedy"]),
    metric=st.sampled_from(["params", "macs"]),
    align=st.sampled_from([1, 4, 8, 16]),
    seed=st.integers(0, 99),
    factors=st.tuples(st.floats(1.2, 3.5), st.floats(1.2, 3.5)).map(sorted),
)
def test_aligned_widths_are_multiples_and_shrink_with_the_factor(
    name, policy, metric, align, seed, factors
):
    model = model_of(name)
    costs = []
    for cf in factors:
        try:
            solution = policy_solution(policy, model, cf, metric, seed, Limits(align))
        except FactorError:  # out of reach at this alignment; another test is about the message
            return
        for width, size in zip(solution.widths, model.sizes, strict=True):
            assert 1 <= width <= size
            assert width % align == 0 or width == size
        assert solution.got == model.factor(solution.widths, metric)
        costs.append(getattr(model(solution.widths), metric))
    assert costs[0] >= costs[1]


def test_a_layer_that_can_only_stay_whole_is_listed():
    plan = zoo.plan(build_model("resnet20-16", 10), IMAGES, cf=2, align=16)
    whole = {name for name, why in plan.unprunable.items() if "align=16" in why}
    assert whole == {
        "conv1",
        *(f"layer1.{n}" for n in ("0.conv1", "0.conv2", "1.conv1", "2.conv1")),
    }
    assert all(plan.widths[name] == 16 for name in whole)
    assert all(width % 16 == 0 for width in plan.widths.values())


def test_pinned_groups_keep_their_ratio_and_the_others_pay():
    module = build_model("resnet20-16", 10)
    asked = {"cf": 2, "profile": "equal", "metric": "macs"}
    pruned = zoo.prune(module, IMAGES, **asked, keep={"layer1": 1.0, "conv1": 0.5})
    widths = pruned.pruning.plan.widths
    assert {widths[n] for n in widths if n.startswith("layer1")} == {16}
    assert widths["conv1"] == 8
    assert pruned.conv1.out_channels == 8
    assert pruned.pruning.plan.got == pytest.approx(2, rel=0.01)
    free = zoo.plan(module, IMAGES, **asked).widths
    assert widths["layer3.0.conv1"] < free["layer3.0.conv1"]


def test_a_pin_holds_for_every_layer_that_it_names():
    module = zoo.create_model("torchvision:resnet18", 10)
    options = {"cf": 3, "profile": "equal"}
    pruned = zoo.prune(module, IMAGES, **options, keep={"layer1": 1.0})
    for name, layer in module.layer1.named_parameters():
        assert pruned.layer1.get_parameter(name).shape == layer.shape, name
    one = zoo.plan(module, IMAGES, **options, keep={"layer1.0.conv2": 1.0}).widths
    assert one["conv1"] == 64 > one["layer1.0.conv1"]
    padded = zoo.prune(build_model("resnet20", 10), IMAGES, **options, keep={"layer2.0.conv2": 1.0})
    assert padded.layer2[0].conv2.out_channels == 32


@pytest.mark.parametrize("policy", ["equal", "greedy"])
def test_a_factor_that_the_pins_forbid_names_the_range(policy):
    module = build_model("cnet", 10)
    with pytest.raises(FactorError, match="reach"):
        zoo.plan(module, IMAGES, cf=3, profile=policy, keep={f"conv{n}": 1 for n in range(1, 7)})
    with pytest.raises(FactorError, match="reach"):
        zoo.plan(
            module, IMAGES, cf=1.1, profile=policy, keep={f"conv{n}": 0.3 for n in range(1, 7)}
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": {"layer9": 1.0}}, "channel group to keep 'layer9'"),
        ({"keep": {"layer3": 0.0}}, r"in \(0, 1\]"),
        ({"keep": {"layer3": "all"}}, r"in \(0, 1\]"),
        ({"keep": {"layer3": 1.0, "layer3.0.conv1": 0.5}}, "pins 'layer3.0.conv1' twice"),
        ({"align": 0}, "align must be an integer of at least 1, got 0"),
        ({"floor": 1.5}, r"floor=1.5: .* in \[0, 1\]"),
        ({"floor": "none"}, r"floor='none': .* in \[0, 1\]"),
        ({"align": 2.5}, "align must be an integer of at least 1, got 2.5"),
    ],
)
def test_limits_that_cannot_be_meant(options, message):
    with pytest.raises(ZooError, match=message):
        zoo.plan(build_model("resnet20-16", 10), IMAGES, cf=2, **options)


@pytest.mark.parametrize("policy", ["equal", "random", "greedy"])
def test_no_layer_goes_below_the_floor_and_the_others_pay(policy):
    module = build_model("resnet20-16", 10)
    free = zoo.plan(module, IMAGES, cf=6, profile=policy)
    held = zoo.plan(module, IMAGES, cf=6, profile=policy, floor=0.39, keep={"conv1": 0.25})
    assert min(free.keep_ratios.values()) < 0.39
    ratios = dict(held.keep_ratios)
    assert ratios.pop("conv1") == 0.25
    assert min(ratios.values()) >= 0.39
    assert held.got == pytest.approx(6, rel=0.01)
    with pytest.raises(FactorError, match="cannot be reached"):
        zoo.plan(module, IMAGES, cf=6, profile=policy, floor=0.5)


def test_a_profile_is_verbatim_unless_it_is_refit():
    dense = build_model("resnet20-16", 10)
    with pytest.raises(ZooError, match="applied verbatim"):
        zoo.load("resnet20-16", 4, dense, profile="searched", align=8)
    refit = zoo.load("resnet20-16", 4, dense, profile="searched", align=8, refit=True)
    widths = refit.pruning.plan.widths
    assert all(width % 8 == 0 for width in widths.values())
    assert refit.pruning.plan.got == pytest.approx(4, rel=0.01)
    assert refit(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@given(
    metric=st.sampled_from(["params", "macs"]),
    policy=st.sampled_from(["equal", "random", "greedy"]),
    align=st.sampled_from([1, 4, 8]),
    whole=st.sampled_from(["conv1", "layer1", "layer2"]),
    cf=st.floats(1.3, 2.5),
)
def test_pins_and_alignment_leave_the_factor_within_one_percent(metric, policy, align, whole, cf):
    groups = stored_groups("resnet20-64")
    assert groups is not None
    pinned = {n: s for n, s in enumerate(groups.sizes) if groups.names[n].startswith(whole)}
    model = cost_model(groups)
    solution = policy_solution(policy, model, cf, metric, 0, Limits(align, pinned, floor=0.2))
    assert solution.got == pytest.approx(cf, rel=0.01)
    assert all(solution.widths[n] == size for n, size in pinned.items())
    assert all(5 * w >= size for w, size in zip(solution.widths, groups.sizes, strict=True))
