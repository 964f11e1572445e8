"""The deployment table goes on where it was, and names what could not be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_deploy
import pytest

import zoo
from zoo.errors import ExportError

OPTIONS = zoo.BenchmarkOptions(batch_sizes=(2,), repeats=1, warmup=0, memory=False, threads=1)


def test_a_killed_table_goes_on_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[str, float]] = []

    def measured(_: Any, arch: str, metric: str, cf: float, align: int) -> dict[str, Any]:
        del arch, align
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((metric, cf))
        return {"got": None, "error": f"none at {cf}", "rows": []}

    config = bench_deploy.Deploy(
        out=tmp_path / "t.jsonl", architectures=("cnet",), factors=(2, 4), aligns=(1,),
        options=OPTIONS,
    )  # fmt: skip
    monkeypatch.setattr(bench_deploy, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        bench_deploy.bench_deploy(config)
    config.out.write_text(config.out.read_text()[:-9])  # the second row, cut short
    first, done[:] = done[0], []
    with pytest.raises(KeyboardInterrupt):
        bench_deploy.bench_deploy(config)
    assert first not in done
    done.clear()
    bench_deploy.bench_deploy(config)
    assert done == [("macs", 4)]
    done.clear()
    capsys.readouterr()
    bench_deploy.bench_deploy(config)
    assert done == []
    lines = [line for line in capsys.readouterr().out.splitlines() if "| cnet |" in line]
    assert len(lines) == 4
    assert all("none at" in line for line in lines)


def test_a_measured_case_is_a_line_with_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = bench_deploy.Deploy(
        out=tmp_path / "t.jsonl", architectures=("cnet",), factors=(2, 1e6), metrics=("macs",),
        aligns=(1,), options=OPTIONS,
    )  # fmt: skip
    bench_deploy.bench_deploy(config)
    good, bad = [line for line in capsys.readouterr().out.splitlines() if "| cnet |" in line]
    cells = [cell.strip() for cell in good.strip("|").split("|")]
    assert len(cells) == len(bench_deploy.HEAD)
    assert cells[:7] == ["cnet", "2x macs", "2.00x", "1", "CPU", "fp32", "2"]
    named = dict(zip(bench_deploy.HEAD, cells, strict=True))
    assert named["MACs"] == "2.00x"
    assert float(named["dense, MB"]) > float(named["pruned, MB"]) > 0
    milliseconds = float(named["dense, ms"].partition(" ")[0])
    rate = float(named["dense, img/s"].replace(",", ""))
    assert rate == pytest.approx(2000 / milliseconds, rel=0.01)
    assert named["dense peak, MB"] == ""
    assert "1e+06x macs" in bad


def test_a_case_that_cannot_be_exported_is_named_and_the_others_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = zoo.benchmark

    def failing(dense: Any, pruned: Any, **options: Any) -> Any:
        if pruned.pruning.plan.asked == 2:
            raise ExportError("an operator\nof no kind")
        return benchmark(dense, pruned, **options)

    monkeypatch.setattr(zoo, "benchmark", failing)
    config = bench_deploy.Deploy(
        out=tmp_path / "t.jsonl", architectures=("cnet",), factors=(2, 4), metrics=("macs",),
        aligns=(1,), options=OPTIONS,
    )  # fmt: skip
    bench_deploy.bench_deploy(config)
    bad, good = [line for line in capsys.readouterr().out.splitlines() if "| cnet |" in line]
    assert "an operator of no kind" in bad
    assert "4x macs" in good


def test_tables_of_other_conditions_are_apart_and_say_theirs() -> None:
    def case(profile: str, repeats: int) -> dict[str, Any]:
        return {
            "architecture": "cnet", "cf": 2, "metric": "macs", "error": f"{profile} {repeats}",
            "machine": "a machine", "profile": profile, "rows": [],
            "options": {"repeats": repeats, "threads": 1},
        }  # fmt: skip

    pages = bench_deploy.markdown([case("equal", 1), case("greedy", 1), case("equal", 2)] * 2)
    heads = [line for line in pages.splitlines() if line.startswith("a machine; ")]
    assert heads == [
        f"a machine; profile {profile}; repeats {repeats}, threads 1."
        for profile, repeats in (("equal", 1), ("greedy", 1), ("equal", 2))
    ]
    page = pages.partition(heads[1])[2].partition(heads[2])[0]
    assert page.count("| cnet | 2x macs | greedy 1 |") == page.count("| cnet |") == 2
