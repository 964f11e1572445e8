"""Benchmarks count what they say, take turns, and call slower slower."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import pytest
import torch
from learnt import halves, trained
from rich.console import Console
from torch import nn

import zoo
from zoo.deployment import BenchmarkOptions
from zoo.errors import ExportError, ZooError
from zoo.measurement import BenchmarkRow, Latency, Measurement, benchmark, compare, time_calls
from zoo.rendering import benchmark_table, comparison_table

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
    monkeypatch.setattr("zoo.measurement.time.perf_counter", lambda: float(next(hours)))
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
    text = shown(comparison_table(rows))
    assert f"{plan.pruned.macs:,}" in text
    assert "CPU fp32 batch 4, ms" in text


def test_requests_that_cannot_be_met_are_named() -> None:
    model = zoo.create_model("cnet", 6, image_size=8)
    with pytest.raises(ZooError, match="Which images are these networks for"):
        benchmark(model, model)
    images = torch.zeros(1, 3, 8, 8)
    for options, message in (
        ({"batch_sizes": ()}, "nothing to measure"),
        ({"batch_sizes": (0,)}, "batch size must be"),
        ({"precisions": ("fp61",)}, "Did you mean 'fp16'"),
        ({"providers": ("CPU",)}, "Unknown ONNX Runtime provider 'CPU'"),
    ):
        asked = BenchmarkOptions(**(vars(QUICK) | options))
        with pytest.raises((ZooError, ExportError), match=message):
            benchmark(model, model, example_input=images, options=asked)
