"""The report of a search: report.md and its plots."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.common.documents import write_text
from zoo.errors import ZooError
from zoo.search.ledger import Row
from zoo.search.summary import (
    Sheet,
    at_factor,
    factors_of,
    figure_4,
    ledger_sheets,
    markdown,
    summarise,
)
from zoo.spec.cost import CostModel
from zoo.spec.profile import Profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

Episodes = Sequence[Mapping[str, Any]]


def write_report(
    folder: Path,
    profiles: Sequence[Profile],
    episodes: Episodes,
    rows: Iterable[Row],
    model: CostModel,
    base: Mapping[str, float],
) -> Path:
    """Write report.md and its plots into the folder of a search.

    The plots show the rewards at each factor, the keep ratios, and the paper's figure 4. Without
    matplotlib, the report says which plots were left out.

    Args:
        folder: the folder of the search.
        profiles: the chosen profiles, one per factor.
        episodes: their infos in order, with `task`, `cf`, `reward`, `factor` and `accuracy`.
        rows: the rows of its ledger.
        model: the cost model of the architecture at its reference.
        base: `network` of a row's key -> accuracy of that base network in [0, 1].

    Returns:
        The path of report.md.
    """
    rows = list(rows)
    sheets = [_profile_sheet(profiles), _episode_sheet(episodes)]
    for profile in profiles:
        at = at_factor(rows, model, profile.cf, profile.metric)
        where = f", at {profile.cf:g}x {profile.metric}"
        sheets += ledger_sheets(summarise(at, model), 5, where)
    draw: dict[str, Callable[[], Figure]] = {
        f"rewards_cf{cf:g}": partial(_rewards, episodes, cf)
        for cf in dict.fromkeys(info["cf"] for info in episodes)
    }
    if profiles:
        metric = profiles[0].metric
        draw["keep_ratios"] = partial(_keep_ratios, profiles)
        draw[f"accuracy_{metric}"] = partial(
            figure_4, summarise(rows, model), model, metric, profiles, base
        )
    parts = [
        f"# Search of {profiles[0].architecture}" if profiles else "# Search that chose no profile",
        *(_facts(profile, model) for profile in profiles),
        *(markdown(sheet) for sheet in sheets if sheet.rows),
        "## Plots",
        *(_plot(folder / f"{name}.png", figure) for name, figure in draw.items()),
    ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _facts(profile: Profile, model: CostModel) -> str:
    """Text: the chosen profile, the agent, the cost of the search, the command to repeat it."""
    factors = factors_of(tuple(profile.kept.values()), model)
    got = ", ".join(f"{factor:.2f}x {metric}" for metric, factor in factors.items())
    text = f"Asked for {profile.cf:g}x {profile.metric}, it chose {profile.name}.json: {got}."
    made = profile.provenance
    if made is None:
        return text
    return (
        f"{text} By {made.agent}, seed {made.seed}: {made.episodes:,} episodes and "
        f"{made.evaluations:,} evaluations in {made.seconds:,.0f} s on {made.machine}, "
        f"{made.date}. Tasks: {'; '.join(made.tasks)}. Fidelity: {made.fidelity}. To run it again:"
        f"\n\n    {made.command}"
    )


def _rewards(episodes: Episodes, cf: float) -> Figure:
    from zoo.common import plots

    return plots.reward_curve([info["reward"] for info in episodes if info["cf"] == cf])


def _keep_ratios(profiles: Sequence[Profile]) -> Figure:
    from zoo.common import plots

    return plots.keep_ratios({profile.name: profile.keep_ratios for profile in profiles})


def _profile_sheet(profiles: Sequence[Profile]) -> Sheet:
    rows = [
        (name, *(f"{p.kept[name]} ({p.keep_ratios[name]:.3f})" for p in profiles))
        for name in (profiles[0].kept if profiles else ())
    ]
    columns = "channel group", *(profile.name for profile in profiles)
    return Sheet("Channels kept, and their share β", 1, columns, rows)


def _episode_sheet(episodes: Episodes) -> Sheet:
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
    return Sheet(
        "Episodes, the best partly by luck: profiles are chosen on fresh channels", 1, columns, rows
    )


def _plot(path: Path, draw: Callable[[], Figure]) -> str:
    """The image in Markdown, or why it was left out."""
    try:
        from zoo.common import plots

        plots.save(draw(), path)
    except ZooError as error:
        return f"{path.name} was left out: {error}"
    return f"![{path.stem.replace('_', ' ')}]({path.name})"
