"""Measure what pruning saves in ONNX Runtime, by architecture, factor, metric and alignment."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deployed_latency import latency_rows, latency_table

import zoo
from zoo.deployment.measurement import BenchmarkRow, Latency, Measurement, machine
from zoo.deployment.padding import padded
from zoo.models import architecture
from zoo.tracing.calls import image_channels

HEAD = ["network", "params", "MACs", "provider", "precision", "MB", "peak MB"]
CONDITIONS = ("machine", "profile", "options")
"""What the cases of one table share."""


@dataclass(frozen=True)
class Deploy:
    """Time the dense network and those that one policy prunes, by turns; print Markdown.

    The results of every architecture and metric are written to a file at once; started again, it
    continues.
    """

    out: Path = Path("deploy.jsonl")
    """file of what was measured so far, a case per line"""
    architectures: tuple[str, ...] = (
        "resnet20-16",
        "torchvision:resnet18",
        "torchvision:resnet50",
        "torchvision:mobilenet_v2",
    )
    """networks, at the image size of their architecture"""
    factors: tuple[float, ...] = (2, 4, 6)
    """compression factors"""
    metrics: tuple[str, ...] = ("params", "macs")
    """metrics of these factors"""
    aligns: tuple[int, ...] = (1, 8, 16)
    """widths are cut to multiples of this, or stay whole"""
    pads: tuple[int, ...] = (8,)
    """widths of networks with align 1 are padded to multiples of this, as in an export"""
    profile: str = "equal"
    """policy that prunes"""
    latency: bool = True
    """also ask for the factors in latency, as `runtime` runs the exported file, and measure it"""
    runtime: zoo.Runtime = field(default_factory=lambda: zoo.Runtime(batch=8))
    """provider, precision, batch and threads of that"""
    options: zoo.BenchmarkOptions = field(default_factory=zoo.BenchmarkOptions)


def bench_deploy(config: Deploy) -> None:
    """Measure the cases that are missing, and print all of them."""
    threads = config.options.threads or torch.get_num_threads()
    options = dataclasses.replace(config.options, threads=threads, pad=1)  # `pads` has its own rows
    config = dataclasses.replace(config, options=options)
    known = read(config.out)
    for arch, metric in itertools.product(config.architectures, config.metrics):
        case = {
            "architecture": arch,
            "metric": metric,
            "factors": config.factors,
            "aligns": config.aligns,
            "pads": config.pads,
            "profile": config.profile,
            "machine": machine(threads),
            "options": dataclasses.asdict(config.options),
        }
        case = json.loads(json.dumps(case))
        if not any(case == {key: row.get(key) for key in case} for row in known):
            known.append(case | measured(config, arch, metric))
            write(config.out, known[-1])
            print(f"{arch} by {metric}: measured", flush=True)
    if cases := [case for case in known if "rows" in case]:
        print(markdown(cases))
    if config.latency:
        print_latency(config, known)


def print_latency(config: Deploy, known: list[dict[str, Any]]) -> None:
    """Measure the latency cases that are missing, and print those of this configuration."""
    threads = config.runtime.threads or torch.get_num_threads()
    runtime = dataclasses.replace(config.runtime, threads=threads)
    print(f"\nLatency: {machine(threads)}; profile {config.profile}; {runtime}.")
    for arch in config.architectures:
        case = {
            "latency_of": arch,
            "factors": config.factors,
            "profile": config.profile,
            "machine": machine(threads),
            "runtime": dataclasses.asdict(runtime),
        }
        case = json.loads(json.dumps(case))
        found = next((row for row in known if case == {key: row.get(key) for key in case}), None)
        if found is None:
            found = case | {
                "latency": latency_rows(
                    arch, config.factors, config.profile, runtime, config.options
                )
            }
            write(config.out, found)
        print("\n".join(["", *latency_table(arch, found["latency"])]), flush=True)


def write(path: Path, case: dict[str, Any]) -> None:
    """Add a line to the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(case))  # \n first: the last may be cut short


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


def measured(config: Deploy, arch: str, metric: str) -> dict[str, Any]:
    """The rows of every factor, each time after a dense one, and the errors of missing networks.

    Each factor is a run of its own, since all networks of a run are in memory together.
    """
    dense = zoo.create_model(arch, architecture(arch).num_classes)
    size = architecture(arch).image_size
    example = torch.zeros(1, image_channels(dense), size, size)
    told, errors = [], {}
    for cf in config.factors:
        networks, unpadded = {"dense": dense}, {}
        for align in config.aligns:
            name = f"{cf:g}x {metric}" + (f", align {align}" if align > 1 else "")
            try:
                networks[name] = zoo.load(
                    arch, cf, dense, profile=config.profile, metric=metric, align=align
                )
                for pad in config.pads if align == 1 else ():
                    filled = f"{name}, pad {pad}"
                    networks[filled], unpadded[filled] = padded(networks[name], pad), name
            except zoo.ZooError as error:
                errors[name] = " ".join(str(error).split())
        if len(networks) > 1:
            rows = zoo.compare(networks, example_input=example, options=config.options)
            own = {row.network: {"params": row.params, "macs": row.macs} for row in rows}
            # the costs of a padded network are those without its zeros
            costs = {name: own[unpadded.get(name, name)] for name in networks}
            told += [dataclasses.asdict(row) | costs[row.network] for row in rows]
    return {"rows": told, "errors": errors}


def markdown(cases: list[dict[str, Any]]) -> str:
    """A table per case, under a line with the conditions of its measurement."""
    lines: list[str] = []
    told = None
    for case in sorted(cases, key=lambda case: [str(case[key]) for key in CONDITIONS]):
        conditions = [case[key] for key in CONDITIONS]
        if conditions != told:
            options = ", ".join(f"{name} {value}" for name, value in case["options"].items())
            lines += ["", f"{case['machine']}; profile {case['profile']}; {options}."]
            told = conditions
        lines += ["", f"**{case['architecture']}, pruned by {case['metric']}**", "", *table(case)]
    return "\n".join([*lines, "", "**All of them**", "", *summary(cases)])


def summary(cases: list[dict[str, Any]]) -> list[str]:
    """How often each kind of widths is slower than dense, and its share of the MACs ratio."""
    kinds: dict[str, list[BenchmarkRow]] = {}
    for row, compared in (pair for case in cases for pair in beside(case)):
        if row["network"] != "dense":
            kind = row["network"].partition(", ")[2] or "as they come"
            kinds.setdefault(kind, []).extend(compared)
    head = ["widths", "measurements", "slower than dense", "share of the MACs ratio, median"]
    lines = [line_of(head), line_of(["---"] * len(head))]
    for kind, compared in kinds.items():
        slower = sum("slower" in row.verdict for row in compared)
        share = statistics.median(row.efficiency for row in compared)
        lines.append(line_of([kind, str(len(compared)), str(slower), f"{share:.0%}"]))
    return lines


def beside(case: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[BenchmarkRow]]]:
    """Every row, and its measurements beside those of the dense network of the same run."""
    whole: dict[str, Any] = {}
    for row in case["rows"]:
        whole = row if row["network"] == "dense" else whole
        pairs = zip(map(taken, whole["measurements"]), map(taken, row["measurements"]), strict=True)
        ratio = whole["macs"] / row["macs"]
        yield row, [BenchmarkRow(*pair, ratio) for pair in pairs]


def table(case: dict[str, Any]) -> list[str]:
    """A line per network, provider and precision, beside the dense network of the same run."""
    batches = case["options"]["batch_sizes"]
    head = [*HEAD, *(f"batch {batch}" for batch in batches)]
    lines = [line_of(head), line_of(["---"] * len(head))]
    dense: dict[str, Any] = {}
    for row, compared in beside(case):
        dense = row if row["network"] == "dense" else dense
        ratios = [f"{dense[cost] / row[cost]:.2f}x" for cost in ("params", "macs")]
        for number in range(0, len(compared), len(batches)):
            kind = compared[number : number + len(batches)]
            one = kind[0].pruned
            peaks = [own.pruned.peak_bytes for own in kind if own.pruned.peak_bytes is not None]
            start = [row["network"], *ratios, one.provider.removesuffix("ExecutionProvider")]
            start += [one.precision, f"{one.bytes / 1e6:.2f}"]
            start += [f"{max(peaks) / 1e6:.0f}" if peaks else ""]
            lines.append(line_of([*start, *(cell(own, row is dense) for own in kind)]))
    return lines + [line_of([name, text]) for name, text in case["errors"].items()]


def taken(row: dict[str, Any]) -> Measurement:
    """A measurement, from JSON."""
    return Measurement(**row | {"latency": Latency(**row["latency"])})


def cell(row: BenchmarkRow, dense: bool) -> str:
    """Milliseconds of a call; for a pruned network also the comparison with the dense one."""
    time = str(row.pruned.latency)
    return time if dense else f"{time}, {row.verdict}, {row.efficiency:.0%}"


def line_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
