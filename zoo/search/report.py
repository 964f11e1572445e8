"""What ledgers hold, as tables and figure 4; and the report that a search leaves to be read."""

from __future__ import annotations

import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from zoo.cost import CostModel, cost_model
from zoo.documents import write_text
from zoo.errors import ZooError, integer
from zoo.profile import METRICS, Profile
from zoo.registry import get_profile, list_profiles
from zoo.search.ledger import Key, Row, read

__all__ = [
    "Standing",
    "Summary",
    "Tally",
    "ledger_report",
    "plot_ledger",
    "summarise",
    "write_report",
]

AT_FACTOR = 0.02
"""How far from a factor, as a share of it, profiles still count as being at it."""

UNNAMED = "not recorded"
"""The source of rows that name none."""

Widths = tuple[int, ...]
Cells = tuple[str, ...]
Episodes = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Standing:
    """What one profile keeps, over its channel seeds.

    Attributes:
        widths: channels kept, per group in order.
        seeds: how many.
        mean, sd: of the accuracies in [0, 1]; sd divides by n - 1, and is 0 for one seed.
        sources: who asked for it.
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
    """Some evaluations: their number, seconds and mean accuracy; the profiles, best mean first."""

    evaluations: int
    seconds: float
    mean: float
    standings: tuple[Standing, ...]


@dataclass(frozen=True)
class Summary:
    """The evaluations whose accuracies can be compared: all of their keys but widths and seed.

    Attributes:
        setting: what they share; it has no widths, and seed 0.
        total: of all of them.
        sources: of those that each agent or policy was the first to ask for, by its name.
    """

    setting: Key
    total: Tally
    sources: dict[str, Tally]


@dataclass(frozen=True)
class _Sheet:
    """A table before it is one: the first `texts` columns are words, the others numbers."""

    title: str
    texts: int
    columns: Cells
    rows: Sequence[Cells]


def summarise(rows: Iterable[Row], model: CostModel | None = None) -> list[Summary]:
    """Rows by what their accuracies depend on beside the profile, ordered by fidelity and network.

    Args:
        rows: of one or several ledgers.
        model: the costs of their architecture at its reference; without, there are no factors.
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
        standings=tuple(sorted(standings, key=lambda s: (-s.mean, s.widths))),
    )


def _standing(widths: Widths, rows: Sequence[Row], model: CostModel | None) -> Standing:
    accuracies = [row.accuracy for row in rows]
    return Standing(
        widths=widths,
        seeds=len(rows),
        mean=statistics.fmean(accuracies),
        sd=statistics.stdev(accuracies) if len(rows) > 1 else 0.0,
        sources=tuple(sorted({row.source or UNNAMED for row in rows})),
        factors=_factors(widths, model),
    )


def _factors(widths: Widths, model: CostModel | None) -> dict[str, float]:
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
    """Tables of what ledgers hold: per setting, per source, and the best profiles of each setting.

    Args:
        paths: as `zoo.search.ledger.read` takes them.
        arch: the architecture that was searched, which a ledger does not say; it gives factors.
        top: how many profiles of each setting.
        cf: only profiles within 2 % of this factor.
        metric: of `cf`.

    Raises:
        DocumentError: for a file that is no ledger.
        ZooError: for no rows (at `cf`), rows of another architecture, or `cf` without `arch`.
    """
    rows = _rows(paths)
    model = _costs(arch, rows) if arch or cf is not None else None
    if model is not None and cf is not None:
        rows = _at(rows, model, cf, metric)
    return [_rich(sheet) for sheet in _sheets(summarise(rows, model), integer("top", top, 1))]


def plot_ledger(
    paths: Sequence[Path], arch: str | None, plot: Path, metric: str = "params"
) -> None:
    """Write figure 4 of ledgers: a panel per setting; `searched` are the bundled profiles.

    Raises:
        DocumentError, ZooError: as `ledger_report`; for no `arch`, a metric without costs, another
            suffix than .png and .svg, or a missing extra.
    """
    from zoo import plots

    rows = _rows(paths)
    model = _costs(arch, rows)
    bundled = [get_profile(e.reference) for e in list_profiles() if e.architecture == arch]
    figure = _figure_4(summarise(rows, model), model, metric, bundled, {}, plots)
    plots.save(figure, plot)


def _rows(paths: Sequence[Path]) -> list[Row]:
    rows = read(paths)
    if not rows:
        raise ZooError(f"No evaluation is in {', '.join(map(str, paths))}.")
    return rows


def _costs(arch: str | None, rows: Iterable[Row]) -> CostModel:
    """The costs of an architecture, if all `rows` can be of it."""
    from zoo.pruning.known_groups import reference_groups  # imports torch

    if arch is None:
        raise ZooError("Factors need the architecture, which a ledger does not say: name it.")
    model = cost_model(reference_groups(arch))
    for widths in {row.key.widths for row in rows}:
        fits = len(widths) == len(model.sizes)
        if not fits or any(not 0 < w <= size for w, size in zip(widths, model.sizes, strict=True)):
            raise ZooError(
                f"The ledger has widths {list(widths)}, which do not fit {arch}: it has "
                f"{len(model.sizes)} channel groups of {list(model.sizes)}."
            )
    return model


def _at(rows: Iterable[Row], model: CostModel, cf: float, metric: str) -> list[Row]:
    factors = {row: model.factor(row.key.widths, metric) for row in rows}
    found = [row for row, factor in factors.items() if abs(factor - cf) <= AT_FACTOR * cf]
    if not found:
        raise ZooError(
            f"No profile of the ledger is at {cf:g}x {metric}; they range from "
            f"{min(factors.values()):.2f}x to {max(factors.values()):.2f}x."
        )
    return found


def _figure_4(
    summaries: Sequence[Summary],
    model: CostModel,
    metric: str,
    searched: Iterable[Profile],
    base: Mapping[str, float],
    plots: Any,
) -> Any:
    """A panel per summary; the base line is `base` by network, or of a profile that keeps all."""
    model.factor(model.sizes, metric)  # refuses a metric that has no costs
    kept = {tuple(profile.kept.values()) for profile in searched}
    panels = []
    for number, summary in enumerate(summaries, start=1):
        setting, profiles = summary.setting, summary.total.standings
        drawn = {name: tally.standings for name, tally in summary.sources.items()}
        drawn["searched"] = tuple(s for s in profiles if s.widths in kept)
        points = {
            name: [(s.factors[metric], s.mean) for s in standings if s.widths != model.sizes]
            for name, standings in drawn.items()
        }
        dense = next((s.mean for s in profiles if s.widths == model.sizes), None)
        title = f"{number}. {setting.network[:10]}, {_data(setting)}, {setting.fidelity}"
        level = base.get(setting.network, dense)
        panels.append(plots.Panel(textwrap.fill(title, 36), points, level))
    return plots.accuracy_against_factor(panels, metric)


def _sheets(summaries: Sequence[Summary], top: int) -> list[_Sheet]:
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
        _Sheet("Settings", 4, settings, evaluations),
        _Sheet("By source, with the factors of its best", 2, asked, sources),
        _Sheet(f"The best {top} of each setting, by mean over seeds", 3, profiles, best),
    ]


def _data(setting: Key) -> str:
    return f"{setting.classes} classes, {setting.image_size}x{setting.image_size}"


def _counts(tally: Tally) -> Cells:
    best = tally.standings[0].mean
    return f"{tally.evaluations:,}", f"{len(tally.standings):,}", f"{best:.2%}", f"{tally.mean:.2%}"


def _multiples(standing: Standing) -> Cells:
    return tuple(f"{factor:.2f}x" for factor in standing.factors.values())


def _rich(sheet: _Sheet) -> Table:
    table = Table(title=f"\n{sheet.title}", title_justify="left", title_style="", box=None)
    for index, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if index < sheet.texts else "right")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def _markdown(sheet: _Sheet) -> str:
    rule = ["---" if index < sheet.texts else "---:" for index in range(len(sheet.columns))]
    lines = [f"| {' | '.join(cells)} |" for cells in (sheet.columns, rule, *sheet.rows)]
    return "\n".join([f"## {sheet.title}", "", *lines])


def write_report(
    folder: Path,
    profiles: Sequence[Profile],
    episodes: Episodes,
    rows: Iterable[Row],
    model: CostModel,
    base: Mapping[str, float],
) -> Path:
    """Write what a search did into its folder: report.md, and the plots that it shows.

    These are the rewards, the keep ratios, and figure 4 for each metric that was searched. Where
    matplotlib is missing, the report says which were left out.

    Args:
        folder: of the search.
        profiles: those it chose, and rivals under their policies' names.
        episodes: infos in order, with `task`, `cf`, `reward`, `factor` and `accuracy`.
        rows: of its ledger.
        model: the costs of the architecture at its reference.
        base: accuracies of the base networks, by the `network` of the rows' keys.

    Returns:
        The path of report.md.
    """
    chosen = [profile for profile in profiles if profile.policy == "searched"]
    summaries = summarise(rows, model)
    sheets = [_profile_sheet(profiles), _episode_sheet(episodes), *_sheets(summaries, 5)]
    draw: dict[str, Callable[[Any], Any]] = {
        "rewards": lambda plots: plots.reward_curve([info["reward"] for info in episodes]),
        "keep_ratios": lambda plots: plots.keep_ratios(
            {_label(profile): profile.keep_ratios for profile in profiles}
        ),
    }
    for metric in sorted({profile.metric for profile in chosen}):
        draw[f"accuracy_{metric}"] = partial(_figure_4, summaries, model, metric, chosen, base)
    parts = [
        f"# Search of {chosen[0].architecture}" if chosen else "# Search without a choice",
        *_facts(chosen, episodes, model),
        *(_markdown(sheet) for sheet in sheets if sheet.rows),
        "## Plots",
        *(_plot(folder / f"{name}.png", figure) for name, figure in draw.items()),
    ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _facts(chosen: Sequence[Profile], episodes: Episodes, model: CostModel) -> list[str]:
    """Paragraphs: what was chosen, who searched and at what expense, the best episode."""
    parts = []
    for profile in chosen:
        factors = _factors(tuple(profile.kept.values()), model)
        got = ", ".join(f"{factor:.2f}x {metric}" for metric, factor in factors.items())
        asked = f"{profile.cf:g}x {profile.metric}"
        parts.append(f"Asked for {asked}, it chose {profile.name}.json: {got}.")
    made = chosen[0].provenance if chosen else None
    if made:
        parts.append(
            f"By {made.agent}, seed {made.seed}: {made.episodes:,} episodes and "
            f"{made.evaluations:,} evaluations in {made.seconds:,.0f} s on {made.machine}, "
            f"{made.date}. Tasks: {'; '.join(made.tasks)}. Fidelity: {made.fidelity}."
        )
        parts.append(f"To run it again:\n\n    {made.command}")
    if episodes:
        number, best = max(enumerate(episodes, start=1), key=lambda item: item[1]["reward"])
        parts.append(
            f"The best of {len(episodes):,} episodes was number {number}, on {best['task']}: "
            f"reward {best['reward']:.3f}, accuracy {best['accuracy']:.2%} at "
            f"{best['factor']:.2f}x where {best['cf']:g}x was asked. Luck flatters the best of "
            f"many; profiles are chosen on fresh draws of channels."
        )
    return parts


def _profile_sheet(profiles: Sequence[Profile]) -> _Sheet:
    rows = [
        (name, *(f"{p.kept[name]} ({p.keep_ratios[name]:.3f})" for p in profiles))
        for name in (profiles[0].kept if profiles else ())
    ]
    columns = "channel group", *map(_label, profiles)
    return _Sheet("Channels kept, and their share β", 1, columns, rows)


def _label(profile: Profile) -> str:
    return f"{profile.policy} {profile.name}"


def _episode_sheet(episodes: Episodes) -> _Sheet:
    """The entries of the queue, each with its best episode."""
    entries = defaultdict(list)
    for info in episodes:
        entries[str(info["task"]), f"{info['cf']:g}x"].append(info)
    rows = []
    for names, own in entries.items():
        best = max(own, key=lambda info: info["reward"])
        mean = statistics.fmean(info["reward"] for info in own)
        got = f"{best['reward']:.3f}", f"{best['factor']:.2f}x", f"{best['accuracy']:.2%}"
        rows.append((*names, f"{len(own):,}", f"{mean:.3f}", *got))
    columns = "task", "asked", "episodes", "mean reward", "best", "its factor", "its accuracy"
    return _Sheet("Episodes", 1, columns, rows)


def _plot(path: Path, draw: Callable[[Any], Any]) -> str:
    """The image in Markdown, or why it was left out."""
    try:
        from zoo import plots

        plots.save(draw(plots), path)
    except ZooError as error:
        return f"{path.name} was left out: {error}"
    return f"![{path.stem.replace('_', ' ')}]({path.name})"
