"""The deployment table goes on where it was, and names what could not be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_deploy
import pytest

import zoo

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
    assert cells[9] == "2.00x"
    assert "1e+06x macs" in bad
