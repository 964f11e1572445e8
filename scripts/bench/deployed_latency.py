"""Latency factors asked of ONNX Runtime: what is predicted, and what the exported files take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import zoo
from zoo.deployment.layer_times import RuntimeClock
from zoo.models import architecture
from zoo.tracing.calls import image_channels

__all__ = ["latency_rows", "latency_table"]

HEAD = [
    "network", "asked", "predicted", "measured", "measured, undisturbed", "ms", "MACs",
    "share of the MACs ratio",
]  # fmt: skip


def latency_rows(
    arch: str,
    factors: Sequence[float],
    profile: str,
    runtime: zoo.Runtime,
    options: zoo.BenchmarkOptions,
) -> list[dict[str, Any]]:
    """A row per factor, of latency and of MACs; all networks take turns with the dense one.

    `measured` is of medians. `undisturbed` is of the fastest calls and, with one thread, of the
    time that it computed, which other programs on the machine change less. `align` is left to the
    runtime. A factor that the policy cannot reach has an `error`.
    """
    dense = zoo.create_model(arch, architecture(arch).num_classes)
    size = architecture(arch).image_size
    example = torch.zeros(1, image_channels(dense), size, size)
    networks: dict[str, nn.Module] = {"dense": dense}
    rows: list[dict[str, Any]] = []
    for metric in ("latency", "macs"):
        for cf in factors:
            row: dict[str, Any] = {"name": f"{cf:g}x {metric}", "asked": cf, "metric": metric}
            try:
                model = zoo.load(arch, cf, dense, profile=profile, metric=metric, runtime=runtime)
                row["predicted"] = model.pruning.plan.got  # type: ignore[union-attr]
                networks[row["name"]] = model
            except zoo.FactorError as error:
                row["error"] = str(error).partition(" Not pruned")[0]
            rows.append(row)
    options = dataclasses.replace(
        options,
        batch_sizes=(runtime.batch,),
        precisions=(runtime.precision,),
        threads=runtime.threads,
        pad=None,  # as an export does; the widths are such that there is nothing to pad
        memory=False,
    )
    whole, *pruned = zoo.compare(networks, example_input=example, options=options)
    told = {row.network: row for row in pruned}
    images = torch.zeros(runtime.batch, *example.shape[1:])
    times = RuntimeClock(runtime).networks(list(networks.values()), images)
    alone = dict(zip(networks, times, strict=True))
    for row in rows:
        if (found := told.get(row["name"])) is not None:
            old, new = whole.measurements[0].latency, found.measurements[0].latency
            row["measured"] = old.median_ms / new.median_ms
            row["undisturbed"] = alone["dense"] / alone[row["name"]]
            row["ms"], row["dense_ms"] = str(new), str(old)
            row["macs"] = whole.macs / found.macs
            row["pad"] = found.measurements[0].pad
    return rows


def latency_table(arch: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(HEAD)} |", f"| {' | '.join(['---'] * len(HEAD))} |"]
    dense = next((row["dense_ms"] for row in rows if "dense_ms" in row), "")
    lines.append(f"| {arch} | | | | | {dense} | | |")
    for row in rows:
        cells = [row["name"], f"{row['asked']:g}x"]
        if "error" in row:
            cells.append(row["error"])
        else:
            latency = row["metric"] == "latency"
            cells.append(f"{row['predicted']:.2f}x" if latency else "")
            off = f" ({row['measured'] / row['asked'] - 1:+.0%})" if latency else ""
            cells.append(f"{row['measured']:.2f}x{off}")
            own = f" ({row['undisturbed'] / row['asked'] - 1:+.0%})" if latency else ""
            cells += [f"{row['undisturbed']:.2f}x{own}", row["ms"], f"{row['macs']:.2f}x"]
            cells.append(f"{row['measured'] / row['macs']:.0%}")
        lines.append(f"| {' | '.join([*cells, *[''] * (len(HEAD) - len(cells))])} |")
    return lines
