"""`zoo search` and `zoo ledger`: new profiles, and what searches have measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from zoo.commands.shared import INTERRUPTED
from zoo.spec.profile import Metric

__all__ = ["LedgerCommand", "SearchCommand", "ledger", "search"]


@dataclass(frozen=True)
class SearchCommand:
    """Search for profiles with reinforcement learning, or another agent."""


def search(command: Any) -> int | None:
    from zoo.commands.rendering import headline
    from zoo.search.run import SearchInterrupted, search_profile

    code = None
    try:
        profiles = search_profile(command)
    except SearchInterrupted as stopped:
        profiles, code = stopped.profiles, INTERRUPTED
    for profile in profiles:
        print(f"{command.out / profile.name}.json: {headline(profile)}")
    return code


@dataclass(frozen=True, kw_only=True)
class LedgerCommand:
    """Summarise ledgers of searches: evaluations by fidelity and source, and the best profiles."""

    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="PATH")]
    """ledgers (.jsonl, .parquet) or folders of runs"""
    arch: str | None = None
    """architecture of the ledgers, which compression factors need"""
    top: int = 10
    """number of best profiles to show per base network and fidelity"""
    cf: float | None = None
    """only profiles at this factor, with --arch"""
    metric: Metric = "params"
    """cost that the factor refers to"""
    plot: Path | None = None
    """plot accuracy against the factor into this .png or .svg file, with --arch"""


def ledger(command: LedgerCommand) -> None:
    from zoo.commands.rendering import print_tables
    from zoo.search.summary import ledger_report, plot_ledger

    print_tables(
        ledger_report(
            command.paths, command.arch, top=command.top, cf=command.cf, metric=command.metric
        )
    )
    if command.plot is not None:
        plot_ledger(command.paths, command.arch, command.plot, command.metric)
        print(f"Wrote {command.plot}")
