"""Latency as a metric: tables by an injected timer; of one real measurement, only its form."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
import zoo.planning.latency
from zoo.errors import FactorError, ZooError
from zoo.models import build_model
from zoo.planning.latency import latency_table
from zoo.registry.store import stored_groups
from zoo.spec.cost import LayerTimes, cost_model
from zoo.tracing.graph import channel_groups

IMAGES = torch.zeros(1, 3, 16, 16)


class Grouped(nn.Module):
    """A stem with a batch norm, a depthwise and a grouped convolution, a head; one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 1, groups=4)
        self.head = nn.Linear(32, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.depthwise(torch.relu(self.norm(self.stem(images))))
        return self.head(self.grouped(hidden).mean((2, 3)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A timer that counts multiply-accumulates in place of time; its calls, in order."""
    calls: list[float] = []

    def count(runs, device, *_) -> list[float]:
        assert device.type == "cpu"
        return [count_one(run) for run in runs]

    def count_one(run) -> float:
        seen: list[float] = []
        conv, linear = nn.functional.conv2d, nn.functional.linear

        def spied_conv(images, weight, *rest):
            out = conv(images, weight, *rest)
            seen.append(weight.numel() * out.shape[-1] * out.shape[-2] * len(out))
            return out

        def spied_linear(images, weight, *rest):
            seen.append(weight.numel() * len(images))
            return linear(images, weight, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, "conv2d", spied_conv)
            patch.setattr(nn.functional, "linear", spied_linear)
            run()
        calls.append(sum(seen))
        return calls[-1]

    monkeypatch.setattr(zoo.planning.latency, "milliseconds", count)
    return calls


TRACED = channel_groups(Grouped().eval(), IMAGES)


def of(module: nn.Module):
    groups = TRACED if isinstance(module, Grouped) else stored_groups("resnet20-16")
    assert groups is not None
    return groups, latency_table(module, groups)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("make", [Grouped, lambda: build_model("resnet20-16", 10)])
def test_where_time_is_macs_the_table_gives_the_macs_at_any_width(make):
    """Every layer was really run at its reduced widths, and the interpolation is exact."""
    module = make().eval()
    groups, table = of(module)
    exact, timed = cost_model(groups), cost_model(groups, table)
    assert sum(layer.ms[-1][-1] for layer in table.layers) == pytest.approx(exact.dense.macs)
    assert table.rest == pytest.approx(0, abs=1e-6)
    for share in (1.0, 0.8, 0.5, 0.3, 0.13):
        widths = [max(-(-size // 8), round(size * share)) for size in groups.sizes]
        assert timed(widths).latency == pytest.approx(exact(widths).macs)
        assert timed.total(widths, "latency") == timed(widths).latency
    group = len(groups.sizes) - 1
    fewer = [size - (g == group) for g, size in enumerate(groups.sizes)]
    saved = timed.marginal(groups.sizes, group)
    assert saved.latency == pytest.approx(timed.dense.latency - timed(fewer).latency)


def test_the_second_table_measures_nothing_and_a_damaged_one_is_measured_again(clock, tmp_path):
    first = of(Grouped().eval())[1]
    measured = len(clock)
    assert measured > 4
    assert of(Grouped().eval())[1] == first
    assert len(clock) == measured
    for path in (tmp_path / "latency").glob("*.json"):
        path.write_text(path.read_text()[:40])
    assert of(Grouped().eval())[1] == first
    assert len(clock) == 2 * measured


def test_like_layers_are_measured_once_and_other_conditions_apart(clock, monkeypatch):
    table = of(build_model("resnet20-16", 10))[1]
    assert len(clock) < sum(len(layer.ms) * len(layer.ms[0]) for layer in table.layers) / 2
    measured = len(clock)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert of(build_model("resnet20-16", 10))[1].conditions.threads == 7
    assert len(clock) == 2 * measured


def test_noise_never_makes_a_wider_layer_the_faster(monkeypatch):
    noise = itertools.cycle([3.0, 1.0, 7.0, 2.0, 5.0])
    monkeypatch.setattr(
        zoo.planning.latency, "milliseconds", lambda runs, *_: [next(noise) for _ in runs]
    )
    groups, table = of(Grouped().eval())
    for layer in table.layers:
        for row in (*layer.ms, *zip(*layer.ms, strict=True)):
            assert list(row) == sorted(row)
    assert table.rest >= 0
    model = cost_model(groups, table)
    totals = [model([min(n, size) for size in groups.sizes]).latency for n in range(1, 33)]
    assert totals == sorted(totals)


def test_the_table_agrees_with_the_whole_network_dense_and_at_half_of_its_widths(monkeypatch):
    """A network twice as slow as its layers, and with a constant: both are found."""
    monkeypatch.setattr(
        zoo.planning.latency, "_measured", lambda calls, _: [c.shape[0] for c in calls]
    )
    whole = [100.0, 70.0]
    monkeypatch.setattr(zoo.planning.latency, "milliseconds", lambda *_: whole)
    groups, table = of(Grouped().eval())
    model = cost_model(groups, table)
    assert model.dense.latency == pytest.approx(100)
    assert model([size // 2 for size in groups.sizes]).latency == pytest.approx(70)
    assert table.rest > 0


def test_a_network_that_smaller_widths_do_not_speed_up_has_no_latency_factor(monkeypatch):
    monkeypatch.setattr(zoo.planning.latency, "milliseconds", lambda runs, *_: [1.0] * len(runs))
    with pytest.raises(FactorError, match=r"latency factor of 2 cannot be reached.*1 to 1\."):
        zoo.plan(Grouped().eval(), IMAGES, cf=2, metric="latency")


def test_between_the_points_of_the_grid_times_are_bilinear_and_outside_as_at_the_edge():
    times = LayerTimes("", (2, 4), (10, 20), ((1.0, 2.0), (3.0, 6.0)))
    assert [times(2, 10), times(4, 20), times(3, 10), times(2, 15)] == [1, 6, 2, 1.5]
    assert times(3, 15) == pytest.approx((1 + 2 + 3 + 6) / 4)
    assert (times(1, 1), times(9, 99), times(9, 15)) == (1, 6, 4.5)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("policy", ["equal", "random", "greedy"])
def test_latency_is_planned_described_saved_and_read_again(policy, tmp_path):
    module = build_model("resnet20-16", 10)
    plan = zoo.plan(module, IMAGES, cf=1.3, profile=policy, metric="latency", align=4)
    assert plan.metric == "latency"
    assert plan.got == plan.dense.latency / plan.pruned.latency
    assert plan.got == pytest.approx(1.3, rel=0.01)
    assert (plan.latency.batch, plan.latency.image_size) == (1, 16)
    assert plan.latency.device
    assert zoo.plan(module, IMAGES, cf=1.3, profile=policy).latency is None
    pruned = zoo.load("resnet20-16", 1.3, module, profile=policy, metric="latency", align=4)
    zoo.save(pruned, tmp_path / "saved")
    readme = (tmp_path / "saved" / "README.md").read_text()
    assert f"| latency in ms | {pruned.pruning.plan.dense.latency:.3g} | " in readme
    assert f"timed on {plan.latency.device}, 1 thread(s), torch {torch.__version__}." in readme
    assert zoo.load_pruned(tmp_path / "saved").pruning == pruned.pruning


def test_no_profile_was_searched_for_a_latency(clock):
    with pytest.raises(FactorError, match="No searched profile of resnet20-16 at 2x latency"):
        zoo.load(
            "resnet20-16", 2, build_model("resnet20-16", 10), metric="latency", profile="searched"
        )
    assert not clock


def test_a_network_that_does_not_take_such_images_says_so():
    class Refusing(Grouped):
        def forward(self, images):
            raise ValueError(f"not {images.shape[-1]} pixels")

    with pytest.raises(ZooError, match=r"\(1, 3, 16, 16\) of float32, which Refusing.*not 16"):
        latency_table(Refusing(), TRACED)


def test_a_network_without_layers_that_are_timed_says_so():
    network = nn.Sequential(
        nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 5, 3), nn.Flatten()
    )
    with pytest.raises(ZooError, match="dense layers, of which Sequential calls none"):
        zoo.plan(network, IMAGES, cf=1.5, metric="latency")


def test_where_nothing_can_be_kept_the_times_serve_all_the_same(clock, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file"))
    assert of(Grouped())[1] == of(Grouped())[1]
    assert clock


def test_a_real_measurement_is_positive_and_leaves_the_network_alone():
    module = Grouped().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    table = of(module)[1]
    assert [layer.weight.split(".")[0] for layer in table.layers] == [
        "stem",
        "depthwise",
        "grouped",
        "head",
    ]
    # on a busy machine half the widths may take as long: then all of it is the rest
    assert all(ms >= 0 for layer in table.layers for row in layer.ms for ms in row)
    assert cost_model(TRACED, table).dense.latency > 0
    assert table.rest >= 0
    assert table.conditions.torch == torch.__version__
    assert all(layer.training for layer in module.modules())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
