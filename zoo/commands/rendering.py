"""What the commands show: profiles as tables, results as lines of text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zoo.commands.shared import printable
from zoo.registry.hub_commits import FoundRepository
from zoo.registry.store import ProfileEntry, untagged
from zoo.registry.weights import BundledWeights
from zoo.spec.profile import Evidence, Profile

if TYPE_CHECKING:
    from zoo.deployment.measurement import BenchmarkRow, ComparisonRow
    from zoo.spec.plans import PruningRecord
    from zoo.training.finetuning import TrainResult

__all__ = [
    "benchmark_table",
    "comparison_table",
    "headline",
    "print_policies",
    "print_profile",
    "print_profiles",
    "print_tables",
    "print_weights",
    "pruning_summary",
    "training_summary",
]

BAR = 32
"""characters of the bar of keep ratio 1"""

NEAR = 0.01
"""Factors within this of the one asked for need no word."""


def print_profiles(entries: Sequence[ProfileEntry], arch: str | None = None) -> None:
    """Print one line per profile: its reference, and the factors asked for and met.

    Args:
        entries: the profiles.
        arch: the architecture they were listed for; other architectures' profiles are provisional.
    """
    table = Table("reference", "architecture", "metric", box=None)
    table.add_column("asked", justify="right")
    table.add_column("got", justify="right")
    for entry in entries:
        factors = f"{entry.cf:g}x", f"{entry.got:.2f}x"
        table.add_row(entry.reference, entry.architecture, entry.metric, *factors)
    console = _console()
    console.print(table if entries else "No such profile; a policy prunes by any factor.")
    for other in dict.fromkeys(entry.architecture for entry in entries):
        if arch and arch != other:
            console.print(_provisional(arch, other), highlight=False)


def print_tables(tables: Iterable[Table]) -> None:
    """Print the tables; piped output is as wide as they need."""
    console = _console(piped=1000)
    for table in tables:
        console.print(table)


def print_policies(architectures: Sequence[str], metric: str | None = None) -> None:
    """Print the `architectures` without a searched profile (by `metric`), and how to prune them."""
    by = f" by {metric}" if metric else ""
    _console().print(
        f"\nNot searched{by}; the best policy prunes them at any factor, or a relative's profile "
        f"(zoo list --arch NAME): "
        f"{', '.join(architectures)}, and any other torchvision:NAME or timm:NAME.",
        highlight=False,
    )


def print_weights(weights: Sequence[BundledWeights]) -> None:
    """Print a line for each network whose trained weights ship with the package."""
    for own in weights:
        _console().print(
            f"Weights for --weights: {own.reference}, {own.test_accuracy:.2%} on {own.data}",
            highlight=False,
        )


def print_repositories(found: Sequence[FoundRepository]) -> None:
    """Print one line per repository of the Hub."""
    table = Table("reference", "tags", box=None)
    table.add_column("downloads", justify="right")
    for each in found:
        table.add_row(each.reference, " ".join(each.tags), f"{each.downloads:,}")
    _console().print(table if found else "The Hub has no repository of the zoo's.")


def print_profile(reference: str, profile: Profile, arch: str | None = None) -> None:
    """Print a bar per channel group, the measured accuracies, and the command of the search.

    Args:
        reference: the reference of the profile, as `bundled:resnet20-16/params-cf4`.
        profile: the profile that it names.
        arch: the architecture it was looked up for, if any.
    """
    console = _console()
    console.print(f"{reference}: {headline(profile)}\n", highlight=False)
    if arch and arch != profile.architecture:
        console.print(f"{_provisional(arch, profile.architecture)}\n", highlight=False)
    console.print(_bars(profile))
    _print_evidence(profile.evidence, console)
    if profile.certificate is not None:
        console.print(f"\n{profile.certificate.verdict}", highlight=False)
    if profile.provenance is not None:
        console.print(f"\nFound by: {profile.provenance.command}", highlight=False)
    if (origin := profile.published) is not None:
        lines = [f"Published by: {origin.source} ({origin.licence})"]
        if origin.claimed:
            lines.append(f"The authors' claim, not measured here: {origin.claimed}")
        if origin.note:
            lines.append(f"Note: {origin.note}")
        console.print("\n" + "\n".join(lines), highlight=False)


def headline(profile: Profile) -> str:
    """The architecture, the factor asked for, and the one met at the reference."""
    reference = profile.reference
    return (
        f"{profile.architecture} at {profile.cf:g}x {profile.metric}, {profile.policy} "
        f"(got {profile.got:.3f}x at {reference.num_classes} classes, "
        f"{reference.image_size}x{reference.image_size})"
    )


def pruning_summary(record: PruningRecord) -> str:
    """Lines of text: the factor asked for and met, parameters and MACs before and after."""
    plan = record.plan
    source, _, name = plan.profile.partition(":")
    borrowed = source == "bundled" and name.rpartition("/")[0] != untagged(record.architecture)
    costs = (
        ("parameters", plan.dense.params, plan.pruned.params),
        ("MACs", plan.dense.macs, plan.pruned.macs),
    )
    lines = [
        f"{record.architecture} by {plan.profile}{' (provisional)' if borrowed else ''}: "
        f"asked {plan.asked:g}x {plan.metric}, got {plan.got:.3f}x at "
        f"{record.num_classes} classes, {plan.input_size}",
        *(f"{name}: {old:,} -> {new:,} ({old / new:.2f}x)" for name, old, new in costs),
    ]
    if abs(plan.got / plan.asked - 1) > NEAR:
        verbatim = "the profile's counts are for its reference, --refit scales them to this network"
        limits = "whole channels, --align, --floor and --keep allow no nearer factor"
        lines.append(f"not {plan.asked:g}x: {verbatim if ':' in plan.profile else limits}")
    if record.new_classifier:
        lines.append(
            f"the classifier is new, because the source has none for these {record.num_classes} "
            "classes: the network has to be trained"
        )
    on, old, new = plan.latency, plan.dense.latency, plan.pruned.latency
    if on is not None and old and new:
        lines.append(
            f"predicted latency: {old:.3g} -> {new:.3g} ms ({old / new:.2f}x), batch {on.batch}, "
            f"{on.dtype}, on {on.where}"
        )
    return "\n".join(lines)


def training_summary(result: TrainResult, test: float | None, epochs: int) -> str:
    """Text: validation and, if measured, `test` accuracy after a training of at most `epochs`."""
    early = f"Interrupted after {len(result.history)} of {epochs} epochs.\n"
    tested = "" if test is None else f", test {test:.2%}"
    return (
        f"{early if result.interrupted else ''}"
        f"validation {result.initial:.2%} -> {result.accuracy:.2%} (epoch {result.epoch} of "
        f"{epochs}){tested}, {result.seconds:.0f} s on {result.device}"
        f"{f', taught by {result.teacher}' if result.teacher else ''}"
    )


def benchmark_table(rows: Sequence[BenchmarkRow]) -> Table:
    """Dense beside pruned: a line per provider, precision and batch size."""
    table = Table("provider", "precision", box=None)
    for column in ("pad", "batch", "dense ms", "pruned ms", "dense img/s", "pruned img/s", "file",
                   "memory", "MACs", "measured", "efficiency"):  # fmt: skip
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        dense, pruned = row.dense, row.pruned
        peaks = dense.peak_bytes, pruned.peak_bytes
        table.add_row(
            dense.provider.removesuffix("ExecutionProvider"),
            dense.precision,
            str(pruned.pad),
            str(dense.batch),
            str(dense.latency),
            str(pruned.latency),
            f"{dense.images_per_second:,.0f}",
            f"{pruned.images_per_second:,.0f}",
            f"{dense.bytes / pruned.bytes:.2f}x",
            f"{peaks[0] / peaks[1]:.2f}x" if peaks[0] and peaks[1] else "",
            f"{row.macs_ratio:.2f}x",
            row.verdict,
            f"{row.efficiency:.0%}",
        )
    return table


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """Networks with their costs and accuracy, and a line per measurement."""
    table = Table("network", box=None)
    for column in ("params", "MACs", "accuracy"):
        table.add_column(column, justify="right")
    table.add_column("provider")
    table.add_column("precision")
    for column in ("pad", "batch", "ms", "img/s", "file", "memory"):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.2%}"
        head = [row.network, f"{row.params:,}", f"{row.macs:,}", accuracy]
        for cell in row.measurements:
            table.add_row(
                *head,
                cell.provider.removesuffix("ExecutionProvider"),
                cell.precision,
                str(cell.pad),
                str(cell.batch),
                str(cell.latency),
                f"{cell.images_per_second:,.0f}",
                f"{cell.bytes:,}",
                "" if cell.peak_bytes is None else f"{cell.peak_bytes:,}",
            )
            head = [""] * len(head)
    return table


def _provisional(arch: str, other: str) -> str:
    from zoo.models import architecture  # imports torch, which other calls do not need

    alike = "which has the same channel groups"
    if architecture(arch).rescaled:
        alike = "whose layers differ in width or shortcut, so that the keep ratios are scaled"
    return f"Provisional for {arch}, {alike}: found and measured on {other}."


def _bars(profile: Profile) -> Table:
    table = Table("channel group", "keep ratio", box=None)
    table.add_column("kept", justify="right")
    table.add_column("β", justify="right")
    for name, kept in profile.kept.items():
        ratio = profile.keep_ratios[name]
        filled = max(1, round(BAR * ratio))
        bar = "█" * filled + "░" * (BAR - filled)
        table.add_row(name, bar, f"{kept}/{round(kept / ratio)}", f"{ratio:.3f}")
    return table


def _print_evidence(evidence: Sequence[Evidence], console: Console) -> None:
    if not evidence:
        console.print("\nNo evidence is stored with this profile.")
        return
    for exam in dict.fromkeys(row.exam for row in evidence):
        own = [row for row in evidence if row.exam == exam]
        table = Table("\npolicy", box=None)
        for column in ("params", "MACs", "before", "accuracy", "seeds"):
            table.add_column(f"\n{column}", justify="right")
        for row in own:
            before = f"{sum(row.before) / len(row.before):.2%}" if row.before else ""
            costs = f"{row.params:,}", f"{row.macs:,}"
            spread = f" ± {row.sd:.2%}" if len(row.seeds) > 1 else ""
            accuracy = f"{row.mean:.2%}{spread}"
            table.add_row(row.policy, *costs, before, accuracy, str(len(row.seeds)))
        console.print(table)
        for fidelity in dict.fromkeys(row.fidelity for row in own):
            console.print(f"{exam[0]}; {fidelity}", highlight=False)


class _Plain(Console):
    """A console that shows text as it is: no markup, and no characters that a terminal obeys."""

    def render_str(self, text: str, **options: Any) -> Text:  # of each line, cell and title
        return super().render_str(printable(text), **options)


def _console(piped: int = 140) -> Console:
    """A console on standard output: as wide as the terminal, or `piped` characters if piped."""
    return _Plain(width=None if sys.stdout.isatty() else piped, markup=False, emoji=False)
