"""Latency of the exported file: a made-up clock of layers, and the form of one real measurement."""

from __future__ import annotations

import json
import math
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import zoo
from zoo.cli import main
from zoo.deployment import layer_times
from zoo.deployment.layer_times import RuntimeClock
from zoo.deployment.options import Runtime
from zoo.errors import ExportError, FactorError, ZooError
from zoo.models import build_model
from zoo.planning.latency import latency_table
from zoo.planning.layer_calls import LayerCall, layer_calls
from zoo.spec.cost import LayerTimes, cost_model
from zoo.storage.artefacts import save_checkpoint
from zoo.tracing.graph import channel_groups

IMAGES = torch.zeros(1, 3, 16, 16)
STEP = 16


class Wide(nn.Module):
    """A stem with a batch norm, a strided and a depthwise convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.strided = nn.Conv2d(64, 96, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(96, 96, 3, padding=1, groups=96)
        self.head = nn.Linear(96, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.strided(torch.relu(self.norm(self.stem(images))))
        return self.head(self.depthwise(hidden).mean((2, 3)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[LayerCall]:
    """Layers cost their multiply-accumulates in blocks of 16 channels; the calls that were timed.

    Whole networks cost the sum of their layers and a constant.
    """
    timed: list[LayerCall] = []

    def cost(call: LayerCall) -> float:
        blocks = [max(1, math.ceil(length / STEP)) for length in call.shape[:2]]
        return 1e-3 * math.prod(blocks) * math.prod(call.shape[2:]) * call.images[0]

    def layer(_: RuntimeClock, call: LayerCall) -> float:
        timed.append(call)
        return cost(call)

    def networks(clock: RuntimeClock, modules, inputs) -> list[float]:
        totals = []
        for module in modules:
            groups = channel_groups(module.eval(), inputs)
            batch = inputs.repeat(clock.runtime.batch // len(inputs), 1, 1, 1)
            totals.append(0.01 + sum(map(cost, layer_calls(module, groups, batch))))
        return totals

    monkeypatch.setattr(RuntimeClock, "_layer", layer)
    monkeypatch.setattr(RuntimeClock, "networks", networks)
    return timed


def test_the_step_is_found_and_times_are_those_of_its_ends(made_up):
    groups = channel_groups(Wide().eval(), IMAGES)
    clock = RuntimeClock(Runtime(batch=2))
    assert clock.step == STEP
    table = latency_table(Wide(), groups, clock)
    model = cost_model(groups, table)
    assert table.rest == pytest.approx(0.01)
    for layer in table.layers:
        for lengths in (layer.outputs, layer.inputs):
            assert all(length % STEP == 0 for length in lengths[:-1])
        for row in (*layer.ms, *zip(*layer.ms, strict=True)):
            assert list(row) == sorted(row)
    totals = [model([width] * len(groups.sizes)).latency for width in range(1, 65)]
    assert totals == sorted(totals)
    steps = {width + 1 for width in range(1, 64) if totals[width] != totals[width - 1]}
    assert steps == {17, 33, 49}
    assert all(call.images[0] == 2 for call in made_up)


@pytest.mark.parametrize(
    ("blocks", "step"), [(lambda n: n, 8), (lambda n: math.ceil(n / 32), 32), (lambda _: 1, 8)]
)
def test_other_steps_are_found_too_and_none_is_what_export_pads_to(blocks, step, monkeypatch):
    monkeypatch.setattr(
        RuntimeClock, "_layer", lambda _, call: float(blocks(call.shape[0]) * blocks(call.shape[1]))
    )
    assert RuntimeClock(Runtime()).step == step


def test_between_the_ends_of_a_step_a_layer_takes_as_long_as_at_the_next():
    times = LayerTimes("", (16, 48), (16, 32), ((1.0, 2.0), (3.0, 6.0)), 16)
    assert [times(1, 1), times(16, 17), times(17, 16), times(33, 16)] == [1, 2, 2, 3]
    assert (times(48, 30), times(50, 40)) == (6, 6)


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("policy", ["equal", "greedy", "global-l2"])
def test_widths_are_multiples_of_the_step_and_an_explicit_align_is_obeyed(policy):
    module, runtime = Wide(), Runtime(batch=2)
    asked = {"cf": 1.5, "profile": policy, "metric": "latency", "runtime": runtime}
    plan = zoo.plan(module, IMAGES, **asked)
    assert {width % STEP for width in plan.widths.values()} == {0}
    assert plan.latency.step == STEP
    odd = zoo.plan(module, IMAGES, **asked, align=1)
    assert plan.got == plan.dense.latency / plan.pruned.latency
    assert odd.got == pytest.approx(plan.got, rel=0.2)
    by_macs = zoo.plan(module, IMAGES, cf=3, profile=policy, metric="macs", runtime=runtime)
    assert {width % STEP for width in by_macs.widths.values()} == {0}
    assert by_macs.latency is None
    with pytest.raises(FactorError, match="latency factor of 100 cannot be reached"):
        zoo.plan(module, IMAGES, **asked | {"cf": 100})


@pytest.mark.usefixtures("made_up")
def test_the_asked_factor_is_met_where_the_ladder_allows_it():
    module = build_model("resnet20-64", 10)
    plan = zoo.plan(module, IMAGES, cf=4, metric="latency", runtime=Runtime(batch=1))
    assert plan.got == pytest.approx(4, rel=0.01)
    assert {width % STEP for width in plan.widths.values()} == {0}


def test_times_are_kept_by_provider_batch_threads_and_version(made_up, monkeypatch):
    module = Wide()

    def plan(**options: object) -> None:
        zoo.plan(module, IMAGES, cf=1.3, metric="latency", runtime=Runtime(**options))

    plan(batch=2)
    first = len(made_up)
    assert first
    plan(batch=2)
    assert len(made_up) == first
    for count, options in enumerate(({"batch": 4}, {"batch": 2, "threads": 7}), 2):
        plan(**options)
        assert len(made_up) == count * first
    monkeypatch.setattr(onnxruntime, "__version__", "0.0")
    plan(batch=2)
    assert len(made_up) == 4 * first
    monkeypatch.setattr(layer_times, "SHORT", {"cpu": "OtherExecutionProvider"})
    monkeypatch.setattr(RuntimeClock, "_wall", lambda *_: 1.0)
    plan(batch=2)
    assert len(made_up) == 5 * first


@pytest.mark.usefixtures("made_up")
def test_record_card_and_summary_name_the_conditions_and_old_records_read(tmp_path, capsys):
    save_checkpoint(build_model("resnet20-64", 10), tmp_path / "base.safetensors", {})
    flags = ["--weights", str(tmp_path / "base.safetensors"), "--profile", "equal", "--size", "16"]
    flags += ["--cf", "2", "--metric", "latency", "--out", str(tmp_path / "out")]
    runtime = ["--provider", "cpu", "--batch", "2", "--threads", "1"]
    assert main(["prune", "resnet20-64", *flags, *runtime]) in (0, None)
    version = onnxruntime.__version__
    said = f"1 thread(s), ONNX Runtime {version} with CPUExecutionProvider"
    printed = capsys.readouterr().out
    assert "batch 2, float32, on " in printed
    assert said in printed
    assert said in (tmp_path / "out" / "README.md").read_text()
    record = zoo.load_pruned(tmp_path / "out").pruning
    assert (record.plan.latency.provider, record.plan.latency.batch) == ("CPUExecutionProvider", 2)
    path = tmp_path / "out" / "pruning.json"
    document = json.loads(path.read_text())
    for name in ("runtime", "provider", "step"):
        del document["plan"]["latency"][name]
    path.write_text(json.dumps(document))
    old = zoo.load_pruned(tmp_path / "out").pruning.plan.latency
    assert (old.runtime, old.provider, old.step) == ("", "", 1)
    assert main(["prune", "resnet20-64", *flags, "--batch", "2"]) == 2
    assert "--batch needs --provider" in capsys.readouterr().err


def test_what_cannot_be_measured_is_refused_before_the_weights_are_read():
    def load(**options: object) -> None:
        runtime = Runtime(**options)
        zoo.load("resnet20-16", 2, "nowhere.pt", profile="equal", metric="latency", runtime=runtime)

    with pytest.raises(ZooError, match=r"runtime must be a zoo\.Runtime, got str"):
        zoo.load("resnet20-16", 2, "nowhere.pt", metric="latency", runtime="cpu")
    with pytest.raises(ZooError, match=r"Unknown ONNX Runtime provider 'cpux'.*'cpu'"):
        load(provider="cpux")
    with pytest.raises(ExportError, match="Unknown ONNX Runtime provider 'AbcExecutionProvider'"):
        load(provider="AbcExecutionProvider")
    if not torch.cuda.is_available():
        for provider, name in (("cuda", "CUDA"), ("tensorrt", "CUDA|Tensorrt")):
            with pytest.raises(ExportError, match=f"({name})ExecutionProvider cannot be used here"):
                load(provider=provider)
    with pytest.raises(ZooError, match="in fp32 or fp16, not in 'int8'"):
        load(precision="int8")
    with pytest.raises(ZooError, match="fp16 is measured on a GPU"):
        load(precision="fp16")
    with pytest.raises(ZooError, match="batch must be an integer of at least 1, got 0"):
        load(batch=0)


def test_a_layer_is_timed_without_the_changes_of_its_layout():
    """By the profiler and by the wall clock: both give a time for every kind of layer."""
    module = Wide().eval()
    clock = RuntimeClock(Runtime(batch=2, threads=1))
    calls = layer_calls(module, channel_groups(module, IMAGES), IMAGES.repeat(2, 1, 1, 1))
    assert len(calls) == 4
    for call in calls:
        assert clock._profiled(call) > 0
        assert clock._wall(call, 3) > 0


def test_a_profile_that_others_disturbed_is_corrected_by_what_the_thread_computed():
    def ran(name: str, ms: float) -> dict[str, object]:
        event = {"cat": "Node", "name": f"{name}_kernel_time", "dur": 1000 * ms}
        return event | {"args": {"op_name": name}}

    quiet = [ran("ReorderInput", 2), ran("Conv", 6), ran("ReorderOutput", 4)] * 7
    assert layer_times._layer_time(quiet, None) == pytest.approx(6)
    assert layer_times._layer_time(quiet, [13.0] * 5) == pytest.approx(6)
    busy = [event | {"dur": 3 * event["dur"]} for event in quiet]
    assert layer_times._layer_time(busy, None) == pytest.approx(18)
    assert layer_times._layer_time(busy, [12.0] * 5) == pytest.approx(6)
    other = [{"cat": "Session", "name": "model_run", "dur": 9}]
    assert layer_times._layer_time([*quiet, *other], None) == pytest.approx(6)


def test_the_file_of_a_layer_computes_what_the_layer_does():
    module = Wide().eval()
    calls = layer_calls(module, channel_groups(module, IMAGES), IMAGES)
    for call, layer in zip(
        calls, (module.stem, module.strided, module.depthwise, module.head), strict=True
    ):
        session = onnxruntime.InferenceSession(layer_times._model(call, 1, "float32"))
        (given,) = session.get_inputs()
        images = torch.full(given.shape, 0.5)
        with torch.no_grad():
            layer.weight.fill_(0.01)
            if layer.bias is not None:
                layer.bias.zero_()
            expected = layer(images)
        (got,) = session.run(None, {given.name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), expected)


def test_relu6_counts_where_it_follows_the_batch_norm():
    blocks = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(inplace=True),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.ReLU6(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    blocks(IMAGES)
    calls = layer_calls(blocks.eval(), channel_groups(blocks, IMAGES), IMAGES)
    assert [(call.normalised, call.capped) for call in calls] == [
        (True, True), (True, False), (False, False), (False, False),
    ]  # fmt: skip
    session = onnxruntime.InferenceSession(layer_times._model(calls[0], 1, "float32"))
    (got,) = session.run(None, {"images_0": IMAGES.numpy() + 1e6})
    assert got.max() == 6


def test_a_real_measurement_is_positive_and_leaves_the_network_alone():
    module = Wide().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    groups = channel_groups(module, IMAGES)
    table = latency_table(module, groups, RuntimeClock(Runtime(batch=2, threads=1)))
    assert cost_model(groups, table).dense.latency > 0
    assert table.rest >= 0
    assert table.conditions.runtime == f"ONNX Runtime {onnxruntime.__version__}"
    assert all(layer.training for layer in module.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
