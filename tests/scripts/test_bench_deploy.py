"""The deployment table goes on where it was, and names what could not be measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_deploy
import pytest

import zoo

OPTIONS = zoo.BenchmarkOptions(batch_sizes=(2,), repeats=1, warmup=0, memory=False, threads=1)


def deploy(out: Path, **changes: Any) -> bench_deploy.Deploy:
    given = {"architectures": ("cnet",), "metrics": ("macs",), "aligns": (1,), "options": OPTIONS}
    given |= {"latency": False}
    return bench_deploy.Deploy(out=out, **given | changes)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_killed_table_goes_on_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[str, str]] = []

    def measured(_: Any, arch: str, metric: str) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((arch, metric))
        cost = {"params": 1, "macs": 1, "measurements": []}
        return {"rows": [{"network": "dense", **cost}], "errors": {"2x": f"none by {metric}"}}

    config = deploy(
        tmp_path / "t.jsonl", architectures=("cnet", "resnet20"), metrics=("params", "macs")
    )
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
    assert done == [("resnet20", "macs")]
    done.clear()
    capsys.readouterr()
    bench_deploy.bench_deploy(config)
    assert done == []
    assert capsys.readouterr().out.count("| none by ") == 4


def test_a_case_is_a_table_with_a_line_per_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = zoo.BenchmarkOptions(
        batch_sizes=(1, 2), precisions=("fp32", "fp16"), repeats=1, warmup=0, memory=False,
        threads=1,
    )  # fmt: skip
    config = deploy(
        tmp_path / "t.jsonl", factors=(2, 1e6), aligns=(1, 8), pads=(8,), options=options
    )
    bench_deploy.bench_deploy(config)
    out = capsys.readouterr().out
    assert "**cnet, pruned by macs**" in out
    page, _, whole = out.partition("**All of them**")
    head, _, *body = [cells(line) for line in page.splitlines() if line.startswith("|")]
    assert [line[0] for line in body] == [
        "dense", "dense", "2x macs", "2x macs", "2x macs, pad 8", "2x macs, pad 8",
        "2x macs, align 8", "2x macs, align 8",
        "1e+06x macs", "1e+06x macs, align 8",
    ]  # fmt: skip
    assert all(line[1] for line in body[-2:])
    dense, half_dense, pruned, _, filled, *_ = (
        dict(zip(head, line, strict=True)) for line in body[:-2]
    )
    assert (dense["precision"], half_dense["precision"]) == ("fp32", "fp16")
    assert (dense["params"], dense["MACs"], pruned["MACs"]) == ("1.00x", "1.00x", "2.00x")
    assert (pruned["provider"], pruned["precision"], pruned["peak MB"]) == ("CPU", "fp32", "")
    assert float(dense["MB"]) > float(filled["MB"]) > float(pruned["MB"]) > 0
    assert (filled["params"], filled["MACs"]) == (pruned["params"], pruned["MACs"])
    for batch in ("batch 1", "batch 2"):
        time, verdict, share = pruned[batch].split(", ")
        before, after = (float(text.partition(" ")[0]) for text in (dense[batch], time))
        assert ("slower" in verdict) == (after > before * 1.005)
        assert float(share.rstrip("%")) == pytest.approx(100 * before / after / 2, abs=2, rel=0.01)
    _, _, *kinds = [cells(line) for line in whole.splitlines() if line.startswith("|")]
    assert [line[:2] for line in kinds] == [["as they come", "4"], ["pad 8", "4"], ["align 8", "4"]]
    for kind, _, slower, share in kinds:
        own = [text for line in body[2:-2] for text in line[-2:] if line[0].endswith(kind)]
        own = own or [text for line in body[2:4] for text in line[-2:]]
        assert int(slower) == sum("slower" in text for text in own)
        shares = [float(text.split(", ")[2].rstrip("%")) for text in own]
        assert float(share.rstrip("%")) == pytest.approx(statistics.median(shares), abs=1)
    (row,) = json.loads(config.out.read_text())["rows"][2:3]
    assert [own["batch"] for own in row["measurements"]] == [1, 2] * 2


def test_tables_of_other_conditions_are_apart_and_say_theirs() -> None:
    def case(profile: str, repeats: int) -> dict[str, Any]:
        return {
            "architecture": "cnet", "metric": "macs", "machine": "a machine", "profile": profile,
            "rows": [{"network": "dense", "params": 1, "macs": 1, "measurements": []}],
            "errors": {"2x": f"none, {profile} {repeats}"},
            "options": {"repeats": repeats, "batch_sizes": [1]},
        }  # fmt: skip

    pages = bench_deploy.markdown([case("equal", 1), case("greedy", 1), case("equal", 2)] * 2)
    heads = [line for line in pages.splitlines() if line.startswith("a machine; ")]
    assert sorted(heads) == [
        f"a machine; profile {profile}; repeats {repeats}, batch_sizes [1]."
        for profile, repeats in (("equal", 1), ("equal", 2), ("greedy", 1))
    ]
    page = pages.partition(heads[1])[2].partition(heads[2])[0]
    own = heads[1].split()
    assert page.count(f"| none, {own[3].strip(';')} {own[5].strip(',')} |") == 2
    assert page.count("| none, ") == 2


def test_latency_asked_of_the_runtime_stands_beside_the_measured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three kinds of rows: a factor of latency, one of MACs, one that cannot be reached."""
    plan = SimpleNamespace(got=2.0)
    calls: list[str] = []

    def load(arch: str, cf: float, _: Any, **options: Any) -> Any:
        calls.append(options["metric"])
        assert options["runtime"] == zoo.Runtime(batch=2, threads=1)
        if cf > 2:
            raise zoo.FactorError("Out of reach. Not pruned: much")
        model = zoo.create_model(arch, 10)
        model.pruning = SimpleNamespace(plan=plan)
        return model

    monkeypatch.setattr(zoo, "load", load)
    monkeypatch.setattr("zoo.deployment.measurement.record_of", lambda _: None)
    monkeypatch.setattr("zoo.deployment.exporting.record_of", lambda _: None)
    monkeypatch.setattr("zoo.deployment.padding.record_of", lambda _: None)
    config = deploy(
        tmp_path / "t.jsonl", architectures=("cnet",), metrics=(), factors=(2, 4), latency=True,
        runtime=zoo.Runtime(batch=2, threads=1),
    )  # fmt: skip
    bench_deploy.bench_deploy(config)
    assert calls == ["latency", "latency", "macs", "macs"]
    out = capsys.readouterr().out
    lines = [cells(line) for line in out.splitlines() if line.startswith("|")]
    head, _, dense, *body = lines
    assert dense[0] == "cnet"
    rows = [dict(zip(head, line, strict=True)) for line in body]
    assert [row["network"] for row in rows] == ["2x latency", "4x latency", "2x macs", "4x macs"]
    assert [row["predicted"] for row in rows] == ["2.00x", "Out of reach.", "", "Out of reach."]
    assert rows[0]["MACs"] == "1.00x"
    assert float(rows[0]["measured"].partition("x")[0]) > 0
    bench_deploy.bench_deploy(config)
    assert len(calls) == 4
    assert capsys.readouterr().out == out
