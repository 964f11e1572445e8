"""Summaries of ledgers: evaluations by setting and source, in tables and the paper's figure 4."""

from __future__ import annotations

import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from zoo.errors import ZooError, integer
from zoo.registry.store import get_profile, list_profiles
from zoo.search.agents import AGENTS
from zoo.search.ledger import Key, Row, read
from zoo.spec.cost import CostModel, cost_model
from zoo.spec.profile import METRICS, Profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Sheet",
    "Standing",
    "Summary",
    "Tally",
    "at_factor",
    "costs_of",
    "factors_of",
    "figure_4",
    "ledger_report",
    "ledger_sheets",
    "markdown",
    "plot_ledger",
    "summarise",
]

AT_FACTOR = 0.02
"""Largest relative distance from a factor at which profiles count as being at it."""

UNNAMED = "not recorded"
"""The source of rows that name none."""

Widths = tuple[int, ...]
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Standing:
    """The accuracy of one profile over its channel seeds.

    Attributes:
        widths: channels kept, per group in order.
        seeds: number of channel seeds.
        mean, sd: of the accuracies in [0, 1]; sd divides by n - 1, and is 0 for one seed.
        sources: agents and policies that asked for it.
        factors: metric -> compression factor at the reference; empty without a cost model.
    """

    widths: Widths
    seeds: int
    mean: float
    sd: float
    sources: tuple[str, ...]
    factors: dict[str, float]


@dataclass(frozen=True)
class Tally:
    """Some evaluations: their number, seconds and mean accuracy; the profiles, best mean first.

    Profiles of a single seed come last: the best of many single measurements is a lucky one.
    """

    evaluations: int
    seconds: float
    mean: float
    standings: tuple[Standing, ...]


@dataclass(frozen=True)
class Summary:
    """Evaluations with comparable accuracies: their keys differ in widths and seed alone.

    Attributes:
        setting: their common key, with no widths, and seed 0.
        total: tally of all of them.
        sources: agent or policy -> tally of those that it was the first to ask for.
    """

    setting: Key
    total: Tally
    sources: dict[str, Tally]


@dataclass(frozen=True)
class Sheet:
    """The content of a table: the first `texts` columns are words, the others numbers."""

    title: str
    texts: int
    columns: Cells
    rows: Sequence[Cells]


def summarise(rows: Iterable[Row], model: CostModel | None = None) -> list[Summary]:
    """One summary per setting, ordered by fidelity and network.

    Args:
        rows: of one or several ledgers.
        model: cost model of their architecture at its reference; without it there are no factors.
    """
    settings: dict[Key, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        settings[replace(row.key, widths=(), seed=0)][row.source or UNNAMED].append(row)
    return [
        Summary(
            setting,
            _tally([row for own in sources.values() for row in own], model),
            {name: _tally(sources[name], model) for name in sorted(sources)},
        )
        for setting, sources in sorted(
            settings.items(), key=lambda item: (item[0].fidelity, astuple(item[0]))
        )
    ]


def _tally(rows: Sequence[Row], model: CostModel | None) -> Tally:
    profiles = defaultdict(list)
    for row in rows:
        profiles[row.key.widths].append(row)
    standings = [_standing(widths, own, model) for widths, own in profiles.items()]
    return Tally(
        evaluations=len(rows),
        seconds=sum(row.seconds for row in rows),
        mean=statistics.fmean(row.accuracy for row in rows),
        standings=tuple(sorted(standings, key=lambda s: (s.seeds == 1, -s.mean, s.widths))),
    )


def _standing(widths: Widths, rows: Sequence[Row], model: CostModel | None) -> Standing:
    accuracies = [row.accuracy for row in rows]
    return Standing(
        widths=widths,
        seeds=len(rows),
        mean=statistics.fmean(accuracies),
        sd=statistics.stdev(accuracies) if len(rows) > 1 else 0.0,
        sources=tuple(sorted({row.source or UNNAMED for row in rows})),
        factors=factors_of(widths, model),
    )


def factors_of(widths: Widths, model: CostModel | None) -> dict[str, float]:
    """Metric -> compression factor of `widths`; empty without a model."""
    if model is None:
        return {}
    known = [metric for metric in METRICS if getattr(model.dense, metric) is not None]
    return {metric: model.factor(widths, metric) for metric in known}


def ledger_report(
    paths: Sequence[Path],
    arch: str | None = None,
    *,
    top: int = 10,
    cf: float | None = None,
    metric: str = "params",
) -> list[Table]:
    """Tables of ledgers: the settings, the sources, and the best profiles of each setting.

    Args:
        paths: as `zoo.search.ledger.read` takes them.
        arch: the architecture that was searched, for factors; a ledger does not name it.
        top: number of profiles per setting.
        cf: only profiles within 2 % of this factor.
        metric: the metric of `cf`.

    Raises:
        DocumentError: for a file that is no ledger.
        ZooError: for no rows (at `cf`), rows of another architecture, or `cf` without `arch`.
    """
    rows = _rows(paths)
    model = costs_of(arch, rows) if arch or cf is not None else None
    if model is not None and cf is not None:
        factors = [model.factor(row.key.widths, metric) for row in rows]
        rows = at_factor(rows, model, cf, metric)
        if not rows:
            raise ZooError(
                f"No profile of the ledger is at {cf:g}x {metric}; they range from "
                f"{min(factors):.2f}x to {max(factors):.2f}x."
            )
    return [_rich(sheet) for sheet in ledger_sheets(summarise(rows, model), integer("top", top, 1))]


def plot_ledger(
    paths: Sequence[Path], arch: str | None, plot: Path, metric: str = "params"
) -> None:
    """Plot figure 4 from ledgers: a panel per setting; the bundled profiles are `searched`.

    Raises:
        DocumentError, ZooError: as `ledger_report`; for no `arch`, a metric without costs, another
            suffix than .png and .svg, or a missing extra.
    """
    from zoo.common import plots

    rows = _rows(paths)
    model = costs_of(arch, rows)
    bundled = [get_profile(e.reference) for e in list_profiles() if e.architecture == arch]
    figure = figure_4(summarise(rows, model), model, metric, bundled, {})
    plots.save(figure, plot)


def _rows(paths: Sequence[Path]) -> list[Row]:
    rows = read(paths)
    if not rows:
        raise ZooError(f"No evaluation is in {', '.join(map(str, paths))}.")
    return rows


def costs_of(arch: str | None, rows: Iterable[Row]) -> CostModel:
    """The cost model of an architecture, if the widths of all `rows` fit it."""
    from zoo.tracing.known_groups import reference_groups  # imports torch

    if arch is None:
        raise ZooError("Factors need the architecture, which a ledger does not name: add --arch.")
    model = cost_model(reference_groups(arch))
    for widths in {row.key.widths for row in rows}:
        fits = len(widths) == len(model.sizes)
        if not fits or any(not 0 < w <= size for w, size in zip(widths, model.sizes, strict=True)):
            raise ZooError(
                f"The ledger has widths {list(widths)}, which do not fit {arch}: it has "
                f"{len(model.sizes)} channel groups of {list(model.sizes)}."
            )
    return model


def at_factor(rows: Iterable[Row], model: CostModel, cf: float, metric: str) -> list[Row]:
    """The rows of profiles within 2 % of the factor `cf` of `metric`."""
    return [row for row in rows if abs(model.factor(row.key.widths, metric) - cf) <= AT_FACTOR * cf]


def figure_4(
    summaries: Sequence[Summary],
    model: CostModel,
    metric: str,
    searched: Iterable[Profile],
    base: Mapping[str, float],
) -> Figure:
    """A panel per summary; its base line is `base` by network, or that of a profile that keeps all.

    `searched` profiles are marked only where they were measured again: the accuracies of episodes
    made them chosen.
    """
    from zoo.common import plots

    model.factor(model.sizes, metric)  # refuses a metric that has no costs
    kept = {tuple(profile.kept.values()) for profile in searched}
    panels = []
    for number, summary in enumerate(summaries, start=1):
        setting, profiles = summary.setting, summary.total.standings
        drawn = {name: tally.standings for name, tally in summary.sources.items()}
        drawn["searched"] = tuple(
            s for s in profiles if s.widths in kept and not set(s.sources) <= set(AGENTS)
        )
        points = {
            name: [(s.factors[metric], s.mean) for s in standings if s.widths != model.sizes]
            for name, standings in drawn.items()
        }
        dense = next((s.mean for s in profiles if s.widths == model.sizes), None)
        title = f"{number}. {setting.network[:10]}, {_data(setting)}, {setting.fidelity}"
        level = base.get(setting.network, dense)
        panels.append(plots.Panel(textwrap.fill(title, 36), points, level))
    return plots.accuracy_against_factor(panels, metric)


def ledger_sheets(summaries: Sequence[Summary], top: int, where: str = "") -> list[Sheet]:
    """The contents of `ledger_report`'s tables; `where` is appended to their titles."""
    evaluations, sources, best = [], [], []
    for number, summary in enumerate(summaries, start=1):
        setting, total, label = summary.setting, summary.total, str(number)
        names = label, setting.network[:10], _data(setting), setting.fidelity
        evaluations.append((*names, *_counts(total), f"{total.seconds:,.0f}"))
        for name, tally in summary.sources.items():
            sources.append((label, name, *_counts(tally), *_multiples(tally.standings[0])))
        for s in total.standings[:top]:
            spread = f"{s.sd:.2%}" if s.seeds > 1 else ""
            who, what = ", ".join(s.sources), " ".join(map(str, s.widths))
            numbers = f"{s.mean:.2%}", spread, str(s.seeds), *_multiples(s)
            best.append((label, who, what, *numbers))
    counts = "evaluations", "profiles", "best", "mean"
    metrics = tuple(summaries[0].total.standings[0].factors) if summaries else ()
    settings = "#", "network", "data", "fidelity", *counts, "seconds"
    asked = "#", "source", *counts, *metrics
    profiles = "#", "source", "widths", "mean", "sd", "seeds", *metrics
    return [
        Sheet(f"Settings{where}", 4, settings, evaluations),
        Sheet(f"By source, with the factors of its best profile{where}", 2, asked, sources),
        Sheet(f"The best {top} of each setting, by mean over seeds{where}", 3, profiles, best),
    ]


def _data(setting: Key) -> str:
    return f"{setting.classes} classes, {setting.image_size}x{setting.image_size}"


def _counts(tally: Tally) -> Cells:
    best = tally.standings[0].mean
    return f"{tally.evaluations:,}", f"{len(tally.standings):,}", f"{best:.2%}", f"{tally.mean:.2%}"


def _multiples(standing: Standing) -> Cells:
    return tuple(f"{factor:.2f}x" for factor in standing.factors.values())


def _rich(sheet: Sheet) -> Table:
    table = Table(title=f"\n{sheet.title}", title_justify="left", title_style="", box=None)
    for index, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if index < sheet.texts else "right")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def markdown(sheet: Sheet) -> str:
    """The table in Markdown, under its title."""
    rule = ["---" if index < sheet.texts else "---:" for index in range(len(sheet.columns))]
    lines = [f"| {' | '.join(cells)} |" for cells in (sheet.columns, rule, *sheet.rows)]
    return "\n".join([f"## {sheet.title}", "", *lines])
