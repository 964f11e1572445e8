"""What pruning saves in ONNX Runtime: architectures, factors, metrics and alignments."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import zoo
from zoo.latency import device_name
from zoo.measurement import BenchmarkRow
from zoo.models import architecture

HEAD = [
    "architecture", "asked", "got", "align", "provider", "precision", "batch", "dense, ms",
    "pruned, ms", "MACs", "measured", "efficiency",
]  # fmt: skip


@dataclass(frozen=True)
class Deploy:
    """Dense beside pruned by one policy, every case in the same run; a Markdown table at the end.

    Cases go into a file one by one: started again, it goes on where it was.
    """

    out: Path = Path("deploy.jsonl")
    """what was measured so far, a case per line"""
    architectures: tuple[str, ...] = (
        "resnet20-16",
        "torchvision:resnet18",
        "torchvision:resnet50",
        "torchvision:mobilenet_v2",
    )
    """at the image size of their reference"""
    factors: tuple[float, ...] = (2, 4, 6)
    """compression factors"""
    metrics: tuple[str, ...] = ("params", "macs")
    """what they count"""
    aligns: tuple[int, ...] = (1, 8)
    """widths are multiples of it, or whole"""
    profile: str = "equal"
    """policy that prunes"""
    options: zoo.BenchmarkOptions = field(default_factory=zoo.BenchmarkOptions)


def bench_deploy(config: Deploy) -> None:
    """Measure the cases that are missing, and print all of them."""
    known = read(config.out)
    cases = itertools.product(config.architectures, config.metrics, config.factors, config.aligns)
    for arch, metric, cf, align in cases:
        case = {
            "architecture": arch,
            "metric": metric,
            "cf": cf,
            "align": align,
            "profile": config.profile,
            "machine": machine(config.options.threads),
            "options": json.loads(json.dumps(dataclasses.asdict(config.options))),
        }
        if not any(case == {key: row[key] for key in case} for row in known):
            known.append(case | measured(config, arch, metric, cf, align))
            with config.out.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(known[-1]))  # a line cut short stays alone
            print(f"{arch} {metric} {cf:g}x align {align}: measured", flush=True)
    print(markdown(known))


def read(path: Path) -> list[dict[str, Any]]:
    """The cases in a file; a line that was cut short is left out."""
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in filter(None, lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: a broken line is measured again")
    return rows


def measured(config: Deploy, arch: str, metric: str, cf: float, align: int) -> dict[str, Any]:
    """The factor met and a row per measurement, or why there is none."""
    dense = zoo.create_model(arch, architecture(arch).num_classes)
    try:
        pruned = zoo.load(arch, cf, dense, profile=config.profile, metric=metric, align=align)
    except zoo.ZooError as error:
        return {"got": None, "error": str(error), "rows": []}
    rows = zoo.benchmark(dense, pruned, options=config.options)
    record: Any = pruned.pruning
    return {"got": record.plan.got, "rows": [flat(row) for row in rows]}


def flat(row: BenchmarkRow) -> dict[str, Any]:
    """A row's numbers, with the ratios that it computes."""
    ratios = {"ratio": row.ratio, "efficiency": row.efficiency, "verdict": row.verdict}
    return dataclasses.asdict(row) | ratios


def markdown(cases: list[dict[str, Any]]) -> str:
    """Every measurement as a line of a Markdown table, under the machine it was made on."""
    lines = []
    for name in dict.fromkeys(case["machine"] for case in cases):
        lines += ["", f"{name}; median (10th to 90th percentile) of each batch", ""]
        lines += [line_of(HEAD), line_of(["---"] * len(HEAD))]
        for case in (case for case in cases if case["machine"] == name):
            lines += [line_of(cells_of(case, row)) for row in case["rows"]]
            if not case["rows"]:
                asked = f"{case['cf']:g}x {case['metric']}"
                lines.append(line_of([case["architecture"], asked, case["error"]]))
    return "\n".join(lines)


def line_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells_of(case: dict[str, Any], row: dict[str, Any]) -> list[str]:
    dense, pruned = row["dense"], row["pruned"]
    return [
        case["architecture"],
        f"{case['cf']:g}x {case['metric']}",
        f"{case['got']:.2f}x",
        str(case["align"]),
        dense["provider"].removesuffix("ExecutionProvider"),
        dense["precision"],
        str(dense["batch"]),
        *(spread(side["latency"]) for side in (dense, pruned)),
        f"{row['macs_ratio']:.2f}x",
        row["verdict"],
        f"{row['efficiency']:.0%}",
    ]


def spread(latency: dict[str, Any]) -> str:
    return f"{latency['median_ms']:.2f} ({latency['p10_ms']:.2f}-{latency['p90_ms']:.2f})"


def machine(threads: int | None) -> str:
    """Device, threads and version that a measurement is of."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"{device_name(torch.device(kind))}, {threads or os.cpu_count()} CPU threads"
    return f"{name}, ONNX Runtime {onnxruntime.__version__}"
