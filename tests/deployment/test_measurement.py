"""Benchmarks count what they say, take turns, and call slower slower."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable

import pytest
import torch
from learnt import halves, trained
from rich.console import Console
from torch import nn

import zoo
from zoo.commands import deploying
from zoo.commands.rendering import benchmark_table, comparison_table, print_tables
from zoo.commands.shared import Network
from zoo.deployment import measurement
from zoo.deployment.measurement import (
    BenchmarkRow,
    ComparisonRow,
    Latency,
    Measurement,
    benchmark,
    compare,
    time_calls,
)
from zoo.deployment.options import BenchmarkOptions
from zoo.errors import DataError, ExportError, ZooError

QUICK = BenchmarkOptions(batch_sizes=(1, 4), repeats=3, warmup=1, memory=False, threads=1)


def notes(names: str, calls: list[str]) -> list[Callable[[], None]]:
    return [lambda name=name: calls.append(name) for name in names]  # type: ignore[misc]


def test_calls_take_turns_after_the_warmup() -> None:
    calls: list[str] = []
    latencies = time_calls(notes("ab", calls), warmup=2, repeats=5, seconds=60)
    assert calls == list("ab" * 7)
    for latency in latencies:
        assert latency.repeats == 5
        assert 0 <= latency.p10_ms <= latency.median_ms <= latency.p90_ms


def test_calls_end_when_their_time_is_up_but_not_before_three(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    hours = itertools.count(step=3600)
    monkeypatch.setattr("zoo.deployment.measurement.time.perf_counter", lambda: float(next(hours)))
    (latency,) = time_calls(notes("a", calls), warmup=5, repeats=9, seconds=1)
    assert latency.repeats == 3
    assert len(calls) == 4
    assert latency.median_ms == 3600e3


@pytest.mark.parametrize(
    "options", [{"repeats": 0}, {"warmup": -1}, {"seconds": 0}, {"repeats": 1.5}]
)
def test_bad_numbers_are_named(options: dict) -> None:
    with pytest.raises(ZooError, match=next(iter(options))):
        time_calls([], **({"warmup": 1, "repeats": 1, "seconds": 1.0} | options))


def test_a_benchmark_has_a_row_per_precision_and_batch() -> None:
    pruned, _ = trained("cnet")
    record = pruned.pruning
    dense = zoo.create_model("cnet", 6, image_size=8)
    options = BenchmarkOptions(**(vars(QUICK) | {"precisions": ("fp32", "int8")}))
    rows = benchmark(dense, pruned, options=options)
    assert [(row.dense.precision, row.dense.batch) for row in rows] == [
        (precision, batch) for precision in ("fp32", "int8") for batch in (1, 4)
    ]
    for row in rows:
        assert (row.dense.network, row.pruned.network) == ("dense", "pruned")
        assert row.macs_ratio == record.plan.dense.macs / record.plan.pruned.macs
        assert row.dense.bytes > row.pruned.bytes
        assert row.dense.provider == row.pruned.provider == "CPUExecutionProvider"
        assert row.pruned.latency.repeats == 3
    assert rows[2].dense.bytes < rows[0].dense.bytes


def made(dense_ms: float, pruned_ms: float, macs_ratio: float = 2.0) -> BenchmarkRow:
    sides = (
        Measurement(name, "CPUExecutionProvider", "fp32", 8, Latency(ms, ms, ms, 5), 4000, peak)
        for name, ms, peak in (("dense", dense_ms, 3_000_000), ("pruned", pruned_ms, 1_000_000))
    )
    return BenchmarkRow(*sides, macs_ratio)


def shown(table: object) -> str:
    page = io.StringIO()
    Console(file=page, width=300).print(table)
    return page.getvalue()


def test_slower_is_called_slower() -> None:
    slow, fast, even = made(4, 5), made(6, 4), made(4, 4.001)
    assert (slow.ratio, slow.efficiency) == (0.8, 0.4)
    assert (slow.verdict, fast.verdict, even.verdict) == ("1.25x slower", "1.50x faster", "as fast")
    assert slow.dense.images_per_second == 2000
    table = shown(benchmark_table([slow, fast])).splitlines()
    assert all(text in table[1] for text in ("2.00x", "1.25x slower", "40%", "3.00x", "2,000"))
    assert "75%" in table[2]


def test_memory_is_that_of_a_process_of_its_own() -> None:
    small, _ = trained("cnet")
    wide = nn.Sequential(nn.Conv2d(3, 4096, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(1),
                         nn.Linear(4096, 2))  # fmt: skip
    options = BenchmarkOptions(batch_sizes=(64,), repeats=1, warmup=0, threads=1)
    (row,) = benchmark(wide, small, options=options)
    if row.dense.peak_bytes is None:
        pytest.skip("this platform does not tell")
    maps = 64 * 4096 * 8 * 8 * 4
    assert maps <= row.dense.peak_bytes <= 4 * maps
    assert row.pruned.peak_bytes < maps


def test_python_files_of_the_working_folder_are_not_run(tmp_path, monkeypatch) -> None:
    (tmp_path / "numpy.py").write_text("open('ran', 'w')")
    model, _ = trained("cnet")
    monkeypatch.chdir(tmp_path)
    options = BenchmarkOptions(batch_sizes=1, repeats=1, warmup=0, threads=1)
    benchmark(model, model, options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["numpy.py"]


def test_a_comparison_looks_at_its_data_before_it_measures(monkeypatch) -> None:
    monkeypatch.setattr(measurement, "_measured", None)
    dense = zoo.create_model("resnet20-16", 10)
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(DataError, match="6 classes"):
        compare({"dense": dense}, data=halves(8).test, example_input=images, options=QUICK)
    with pytest.raises(ZooError, match="Give the networks by name"):
        compare([dense], example_input=images)


def test_one_value_stands_for_a_tuple_of_it() -> None:
    options = BenchmarkOptions(batch_sizes=4, precisions="fp32", providers=["CPUExecutionProvider"])
    assert (options.batch_sizes, options.precisions) == ((4,), ("fp32",))
    assert options.providers == ("CPUExecutionProvider",)


def test_a_comparison_counts_every_network_once() -> None:
    pruned, _ = trained("resnet20-16")
    dense = zoo.create_model("resnet20-16", 6)
    test = halves(8).test
    rows = compare({"dense": dense, "half": pruned}, data=test, options=QUICK)
    plan = pruned.pruning.plan
    assert [(row.network, row.params, row.macs) for row in rows] == [
        ("dense", plan.dense.params, plan.dense.macs),
        ("half", plan.pruned.params, plan.pruned.macs),
    ]
    assert [row.accuracy for row in rows] == [
        zoo.evaluate(network, test).accuracy for network in (dense, pruned)
    ]
    assert [cell.batch for cell in rows[1].measurements] == [1, 4]
    head, *lines = (line.split() for line in shown(comparison_table(rows)).splitlines())
    assert " ".join(head) == (
        "network params MACs accuracy provider precision pad batch ms img/s file memory"
    )
    assert [line[0] for line in lines] == ["dense", "CPU", "half", "CPU"]
    small = rows[1].measurements
    assert lines[2][1:3] == [f"{plan.pruned.params:,}", f"{plan.pruned.macs:,}"]
    assert lines[3] == [
        "CPU", "fp32", "8", "4", *str(small[1].latency).split(),
        f"{small[1].images_per_second:,.0f}", f"{small[1].bytes:,}",
    ]  # fmt: skip


def test_tables_lose_no_number_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    assert str(Latency(5129.87, 0.012345, 123456.7, 5)) == "5130 (0.0123-123000)"
    latency = Latency(5129.87, 5081.2, 5391.4, 5)
    side = Measurement("a", "TensorrtExecutionProvider", "int8-symmetric", 256, latency, 8, 10**9)
    row = BenchmarkRow(side, side, 123.45)
    compared = ComparisonRow("a network of a long name", 10**9, 10**12, 0.5, (side,) * 4)
    print_tables([benchmark_table([row]), comparison_table([compared])])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5  # none was broken
    assert lines[1].count("5130 (5080-5390)") == 2
    assert lines[1].split()[-4:] == ["123.45x", "as", "fast", "1%"]
    assert lines[3].split()[-5:] == ["5130", "(5080-5390)", "50", "8", "1,000,000,000"]


def test_a_networks_name_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    side = Measurement("a", "CPUExecutionProvider", "fp32", 1, Latency(1, 1, 1, 5), 8, None)
    names = "runs/[/old]", "runs/[old]", "runs/\x1b[31m"
    print_tables([comparison_table([ComparisonRow(name, 1, 1, None, (side,)) for name in names])])
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["network", "runs/[/old]", "runs/[old]", "runs/�[31m"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.lstm(images)


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        ("cnet", (1, 3, 16, 16), "does not take inputs of shape"),
        ("cnet", (3, 8, 8), "take inputs of shape \\(1, 8, 8\\)"),
        (Recurrent(), (1, 3, 8, 8), "does not take inputs of shape"),
        (nn.Flatten(), (1, 3, 8, 8), "dense has no multiply-accumulates"),
        ("a.pt", (1, 3, 8, 8), "Only modules can be exported, not str"),
    ],
)
def test_networks_and_images_that_cannot_be_measured_are_named(
    network: object, shape: tuple[int, ...], message: str
) -> None:
    if network == "cnet":
        network = zoo.create_model("cnet", 6, image_size=8)
    with pytest.raises(ExportError, match=message):
        benchmark(network, network, example_input=torch.zeros(shape), options=QUICK)
    with pytest.raises(ExportError, match=message.replace("dense", "a")):
        compare({"a": network}, example_input=torch.zeros(shape), options=QUICK)


def test_networks_for_images_of_two_sizes_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": Network(nn.Identity(), 8, "a"), "b": Network(nn.Identity(), 32, "b")}
    monkeypatch.setattr(deploying, "read_network", lambda name, *_: sizes[name])
    with pytest.raises(ZooError, match=r"images of 8, 32 pixels per side; .* --size"):
        deploying.compare(deploying.CompareCommand(networks=("a", "b")))
    with pytest.raises(ZooError, match="Name at least one"):
        deploying.compare(deploying.CompareCommand(networks=()))


def test_requests_that_cannot_be_met_are_named() -> None:
    model = zoo.create_model("cnet", 6, image_size=8)
    with pytest.raises(ZooError, match="Which images are these networks for"):
        benchmark(model, model)
    images = torch.zeros(1, 3, 8, 8)
    for options, message in (
        ({"batch_sizes": ()}, "nothing to measure"),
        ({"batch_sizes": (0,)}, "batch size must be"),
        ({"precisions": ("fp61",)}, "Did you mean 'fp16'"),
        ({"providers": ("CPUExecutionProvider",), "cuda_graph": True}, "CUDA graphs need"),
        ({"providers": ("CPU",)}, "Unknown ONNX Runtime provider 'CPU'"),
    ):
        asked = BenchmarkOptions(**(vars(QUICK) | options))
        with pytest.raises((ZooError, ExportError), match=message):
            benchmark(model, model, example_input=images, options=asked)


class Attending(nn.Module):
    """A convolution and the attention of its 16 positions of 8 channels to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv(images).flatten(2).transpose(1, 2)[:, None]
        return self.fc(nn.functional.scaled_dot_product_attention(x, x, x).mean((1, 2)))


def test_the_macs_of_attention_count() -> None:
    (row,) = compare({"a": Attending()}, example_input=torch.zeros(1, 3, 4, 4), options=QUICK)
    assert row.macs == 16 * 3 * 8 + 2 * 16 * 16 * 8 + 8 * 6


class Recurrent(nn.Module):
    """A convolution and a recurrent layer along its 16 positions of 8 channels."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.conv, self.layer, self.fc = nn.Conv2d(3, 8, 1), layer(8, 5), nn.Linear(5, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        steps = self.conv(images).flatten(2).permute(2, 0, 1)
        return self.fc(self.layer(steps)[0].mean(0))


@pytest.mark.parametrize(("layer", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_the_macs_of_recurrent_layers_count(layer: type[nn.RNNBase], gates: int) -> None:
    images = torch.zeros(1, 3, 4, 4)
    (row,) = compare({"a": Recurrent(layer)}, example_input=images, options=QUICK)
    assert row.macs == 16 * 3 * 8 + 16 * gates * (8 + 5) * 5 + 5 * 6


def test_a_network_whose_values_vanish_in_fp16_is_timed_though_not_exported(tmp_path) -> None:
    """As an untrained MobileNetV2, whose logits are about 1e-9."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(16)]
    for layer in layers:
        layer.weight.data *= 0.2
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 64, 4, bias=False)).eval()
    images = torch.rand(4, 3, 8, 8)
    with pytest.raises(ExportError, match="arithmetic in fp16 the module's outputs change"):
        zoo.export(network, tmp_path / "a.onnx", inputs=images, precision="fp16")
    options = dataclasses.replace(QUICK, precisions=("fp16",))
    assert len(benchmark(network, network, example_input=images, options=options)) == 2
