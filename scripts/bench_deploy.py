"""What pruning saves in ONNX Runtime: architectures, factors, metrics and alignments."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.measurement import BenchmarkRow, Latency, machine
from zoo.models import architecture

HEAD = [
    "architecture", "asked", "got", "align", "provider", "precision", "batch", "dense, ms",
    "pruned, ms", "dense, img/s", "pruned, img/s", "dense, MB", "pruned, MB",
    "dense peak, MB", "pruned peak, MB", "MACs", "measured", "efficiency",
]  # fmt: skip
CONDITIONS = ("machine", "profile", "options")
"""What the cases of one table share."""


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
    threads = config.options.threads or torch.get_num_threads()
    options = dataclasses.replace(config.options, threads=threads)
    config = dataclasses.replace(config, options=options)
    known = read(config.out)
    cases = itertools.product(config.architectures, config.metrics, config.factors, config.aligns)
    for arch, metric, cf, align in cases:
        case = {
            "architecture": arch,
            "metric": metric,
            "cf": cf,
            "align": align,
            "profile": config.profile,
            "machine": machine(threads),
            "options": json.loads(json.dumps(dataclasses.asdict(options))),
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
        rows = zoo.benchmark(dense, pruned, options=config.options)
    except zoo.ZooError as error:
        return {"got": None, "error": str(error), "rows": []}
    record: Any = pruned.pruning
    return {"got": record.plan.got, "rows": [flat(row) for row in rows]}


def flat(row: BenchmarkRow) -> dict[str, Any]:
    """A row's numbers, with those that it computes."""
    computed = {
        "ratio": row.ratio,
        "efficiency": row.efficiency,
        "verdict": row.verdict,
        "images_per_second": [side.images_per_second for side in (row.dense, row.pruned)],
    }
    return dataclasses.asdict(row) | computed


def markdown(cases: list[dict[str, Any]]) -> str:
    """Every measurement as a line of a Markdown table, under the conditions it was made in."""
    lines = []
    tables = {json.dumps([case[key] for key in CONDITIONS]): case for case in cases}
    for conditions, first in tables.items():
        options = ", ".join(f"{name} {value}" for name, value in first["options"].items())
        lines += ["", f"{first['machine']}; profile {first['profile']}; {options}."]
        lines += ["Median (10th to 90th percentile) of each batch.", ""]
        lines += [line_of(HEAD), line_of(["---"] * len(HEAD))]
        for case in cases:
            if json.dumps([case[key] for key in CONDITIONS]) != conditions:
                continue
            lines += [line_of(cells_of(case, row)) for row in case["rows"]]
            if not case["rows"]:
                asked = f"{case['cf']:g}x {case['metric']}"
                error = " ".join(case["error"].split())
                lines.append(line_of([case["architecture"], asked, error]))
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
        *(str(Latency(**side["latency"])) for side in (dense, pruned)),
        *(f"{rate:,.0f}" for rate in row["images_per_second"]),
        *(megabytes(side[size]) for size in ("bytes", "peak_bytes") for side in (dense, pruned)),
        f"{row['macs_ratio']:.2f}x",
        row["verdict"],
        f"{row['efficiency']:.0%}",
    ]


def megabytes(count: int | None) -> str:
    """Empty where the bytes are not known."""
    return "" if count is None else f"{count / 1e6:.2f}"
