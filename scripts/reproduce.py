"""The paper's figures, redrawn from the registry's evaluations: a PNG, a table and a verdict each.

    python scripts/reproduce.py fig3 --arch resnet20-16 --out figures

Nothing is trained. Figures 1 to 3 take the evaluations of the campaign's stage `figures`, 4 and 6
those of its stages `ledger` and `certificate`, and 12 plays PPO where a ledger's evaluations stand
in for the network.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro
from tyro.conf import Positional

from zoo.common.plots import (
    Panel,
    accuracy_against_factor,
    accuracy_by_factor,
    reward_band,
    reward_landscape,
    save,
)
from zoo.errors import ZooError, integer
from zoo.search.agents import agent
from zoo.search.ledger import TEST, Row, read
from zoo.search.ledger_benchmark import LedgerBenchmark
from zoo.search.lookup import ledger_path
from zoo.search.reward import landscape
from zoo.search.summary import at_factor, costs_of
from zoo.spec.cost import CostModel
from zoo.tracing.known_groups import reference_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Name = Literal["fig1", "fig2", "fig3", "fig4", "fig6", "fig9", "fig10", "fig11", "fig12"]

REWARDS = {"fig9": "gaussian", "fig10": "n2n", "fig11": "hyperbolic"}

LEVEL = 1.0
"""Points of accuracy within which figures 2 and 3 call two means level."""

FEWEST = 10
"""Random profiles of a factor, for figure 4 to show it."""

TRANSFERRED = 5
"""Best profiles of each factor that figure 6 takes to other data."""

Series = dict[str, dict[float, list[float]]]


@dataclass(frozen=True)
class Options:
    figure: Positional[Name]
    """which one"""
    arch: str = "resnet20-16"
    """architecture"""
    ledger: Path | None = None
    """file of evaluations; by default that of the registry"""
    cf: Annotated[tuple[float, ...], tyro.conf.arg(metavar="CF ...")] = (2.0, 4.0, 6.0)
    """factors in parameters"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of PPO, for figure 12"""
    episodes: int = 640
    """of PPO, for figure 12"""
    out: Path = Path("figures")
    """folder of the image"""


@dataclass(frozen=True)
class Drawn:
    """A figure, what it shows as a table, and whether the paper's claim holds in it."""

    figure: Figure
    lines: tuple[str, ...]
    verdict: str


@dataclass(frozen=True)
class Evaluations:
    """The rows of a ledger, and the factors that they are looked at."""

    arch: str
    rows: tuple[Row, ...]
    model: CostModel
    cf: tuple[float, ...]

    @classmethod
    def of(cls, options: Options) -> Evaluations:
        rows = tuple(read([options.ledger or ledger_path(options.arch)]))
        return cls(options.arch, rows, costs_of(options.arch, rows), options.cf)

    def series(self, name: Callable[[Row], str | None]) -> Series:
        """Name -> factor -> accuracies; rows without a name or away from every factor are left."""
        found: Series = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            own, cf = name(row), self.at(row)
            if own is not None and cf is not None:
                found[own][cf].append(row.accuracy)
        return {own: dict(points) for own, points in found.items()}

    def of_sources(self, *sources: str) -> Series:
        return self.series(lambda row: row.source if row.source in sources else None)

    def at(self, row: Row) -> float | None:
        """The factor in parameters that the row's profile was made for, not by MACs."""
        found = next((cf for cf in self.cf if at_factor([row], self.model, cf, "params")), None)
        params, macs = (
            min(abs(self.model.factor(row.key.widths, metric) / cf - 1) for cf in self.cf)
            for metric in ("params", "macs")
        )
        return found if params <= macs else None

    @property
    def missing(self) -> ZooError:
        """The error for a figure that has nothing to show."""
        return ZooError(
            f"The evaluations of {self.arch} that this figure shows are not there yet: "
            f"python scripts/campaign.py run, and merge."
        )

    def like_most(self, wanted: Callable[[Row], bool]) -> Evaluations:
        """The rows of the base network, images and fidelity with most of the wanted rows.

        Of as many on several, those on test images are taken.

        Raises:
            ZooError: if there are none.
        """
        counts = Counter(setting_of(row) for row in self.rows if wanted(row))
        if not counts:
            raise self.missing
        most = max(counts, key=lambda setting: (counts[setting], setting.split.startswith(TEST)))
        return replace(self, rows=tuple(row for row in self.rows if setting_of(row) == most))


class Setting(NamedTuple):
    network: str
    split: str
    fidelity: str


def setting_of(row: Row) -> Setting:
    return Setting(row.key.network, row.key.split, row.key.fidelity)


def lines_of(title: str, of: Evaluations, series: Series) -> tuple[Figure, tuple[str, ...]]:
    """The plot of the series, and their table."""
    heads = [f"{cf:g}x params" for cf in of.cf]
    rows = []
    for name, points in series.items():
        cells = [told(points.get(cf, [])) for cf in of.cf]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    table = (f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads), *rows)
    return accuracy_by_factor(title, series, "params"), table


def told(accuracies: list[float]) -> str:
    if not accuracies:
        return ""
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return f"{statistics.fmean(accuracies):.2%} ± {100 * spread:.2f} ({len(accuracies)})"


def differences(series: Series, one: str, other: str) -> dict[float, float]:
    """Factor -> mean accuracy of `one` less that of `other`, in points."""
    both = series.get(one, {}).keys() & series.get(other, {}).keys()
    return {
        cf: 100 * (statistics.fmean(series[one][cf]) - statistics.fmean(series[other][cf]))
        for cf in sorted(both)
    }


def signs(found: Mapping[float, float]) -> str:
    return ", ".join(f"{value:+.1f} points at {cf:g}x" for cf, value in found.items()) or "nothing"


def initialisation(options: Options) -> Drawn:
    """Figure 1: pruned networks with the base network's weights, or with new ones."""
    of = Evaluations.of(options)
    scratch = "from scratch, "
    key = (
        of.like_most(lambda row: row.source == "equal" and row.key.fidelity.startswith(scratch))
        .rows[0]
        .key
    )
    network, trained = key.network, key.fidelity.removeprefix(scratch)
    names = {"fine-tune": "weights of the base network", "from scratch": "new weights"}

    def name(row: Row) -> str | None:
        kind, _, how = row.key.fidelity.partition(", ")
        own = (row.key.network, row.source, row.key.criterion) == (network, "equal", "random")
        return names.get(kind) if own and how == trained else None

    series = of.series(name)
    found = differences(series, "new weights", "weights of the base network")
    if not found:
        raise of.missing
    figure, table = lines_of(f"{of.arch}: which weights to start from", of, series)
    return Drawn(
        figure,
        table,
        f"The paper: new weights are always as good or better. Here, after "
        f"{trained.partition(', ')[0]}: new weights against those of the base network, "
        f"{signs(found)}; {holds(all(value >= 0 for value in found.values()))}.",
    )


def channels(options: Options) -> Drawn:
    """Figure 2: which channels to keep; pruned at once here, layer by layer in the paper."""
    of = Evaluations.of(options).like_most(lambda row: row.key.criterion == "taylor")
    series = of.series(lambda row: row.key.criterion if row.source == "equal" else None)
    found = {other: differences(series, other, "random") for other in series if other != "random"}
    gained = [value for values in found.values() for value in values.values()]
    if not gained:
        raise of.missing
    figure, table = lines_of(f"{of.arch}: which channels to keep", of, series)
    parts = "; ".join(f"{other} against random, {signs(own)}" for other, own in found.items())
    claim = all(own[min(own)] <= LEVEL and own[max(own)] > LEVEL for own in found.values() if own)
    return Drawn(
        figure,
        table,
        f"The paper: random channels are as good as others at low factors, l1 and Taylor better at "
        f"high ones. Here: {parts}; nothing is more than "
        f"{max(map(abs, gained)):.1f} points away from random; {holds(claim)}.",
    )


def handmade(options: Options) -> Drawn:
    """Figure 3: equal, increasing and decreasing profiles beside random ones."""
    of = Evaluations.of(options).like_most(lambda row: row.source == "increasing" and short(row))
    series = of.of_sources("equal", "increasing", "decreasing", "random")
    found = differences(series, "decreasing", "equal")
    others = [differences(series, one, "equal").values() for one in ("increasing", "random")]
    if not any(others):
        raise of.missing
    figure, table = lines_of(f"{of.arch}: how much to keep", of, series)
    most = max(abs(value) for values in others for value in values)
    worse = signs(found) if found else "out of reach"
    claim = most <= LEVEL and all(value < -LEVEL for value in found.values())
    return Drawn(
        figure,
        table,
        f"The paper: no significant differences, but decreasing profiles are worse than equal ones "
        f"on ResNets. Here: decreasing against equal, {worse}; the others are up to {most:.1f} "
        f"points away from equal; {holds(claim)}.",
    )


def cloud(options: Options) -> Drawn:
    """Figure 4: every random profile, the best of each factor, and what was searched elsewhere."""
    of = Evaluations.of(options).like_most(random_and_short)
    series = of.of_sources("random", "searched")
    random = {cf: own for cf, own in series.get("random", {}).items() if len(own) >= FEWEST}
    if not random:
        raise ZooError(f"No factor has {FEWEST} random profiles of {of.arch} yet.")
    found = {cf: statistics.fmean(own) for cf, own in series.get("searched", {}).items()}
    points = {
        "random": [(cf, value) for cf, own in random.items() for value in own],
        "best random": [(cf, max(own)) for cf, own in random.items()],
        "searched": list(found.items()),
    }
    figure = accuracy_against_factor([Panel(of.arch, points)], "params")
    rows, near, better = [], [], []
    for cf, own in sorted(random.items()):
        near.append(sum(value >= max(own) - 0.01 for value in own) / len(own))
        cells = [f"{value:.2%}" for value in (min(own), statistics.median(own), max(own))]
        if cf in found:
            better.append(f"{sum(value >= found[cf] for value in own) / len(own):.0%} at {cf:g}x")
        cells += [f"{near[-1]:.0%}", f"{found[cf]:.2%}" if cf in found else ""]
        rows.append(f"| {cf:g}x | {len(own)} | {' | '.join(cells)} |")
    beside = f"As good as the one searched on another base network: {', '.join(better)}."
    return Drawn(
        figure,
        (
            "| params | random | least | median | greatest | within a point of it | searched |",
            "|---|" + "---:|" * 6,
            *rows,
        ),
        f"The paper: at every factor a few random profiles are at the top and most lose accuracy. "
        f"Here: {', '.join(f'{share:.0%}' for share in near)} of them are within a point of the "
        f"best; {holds(all(share < 0.5 for share in near))}.{' ' + beside if better else ''}",
    )


def transfer(options: Options) -> Drawn:
    """Figure 6: the best random profiles of one base network on other data that it never saw."""
    of = Evaluations.of(options)
    measured: dict[str, dict[tuple[int, ...], Row]] = defaultdict(dict)
    chosen = of.like_most(random_and_short).rows[0].key
    home = chosen.network
    for row in of.rows:
        if (row.source, row.key.fidelity) == ("random", chosen.fidelity):
            measured[row.key.network][row.key.widths] = row
    away = max(
        (name for name in measured if name != home),
        key=lambda name: len(measured[name].keys() & measured[home].keys()),
        default=home,
    )
    both = measured[home].keys() & measured[away].keys()
    if away == home or not both:
        raise ZooError(f"Random profiles of {of.arch} were measured on one base network alone.")
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {"random": [], "searched": []} for name in (home, away)
    }
    rows, ranks = [], []
    for cf in of.cf:
        own = sorted(
            (widths for widths in both if of.at(measured[home][widths]) == cf),
            key=lambda widths: -measured[home][widths].accuracy,
        )
        if not own:
            continue
        best = own[:TRANSFERRED]
        for name, series in panels.items():
            series["random"] += [(cf, measured[name][widths].accuracy) for widths in own]
            series["searched"] += [(cf, measured[name][widths].accuracy) for widths in best]
        there = [measured[away][widths].accuracy for widths in own]
        above = [sum(value > measured[away][w].accuracy for value in there) for w in best]
        ranks.append(statistics.median(above) / len(own))
        rows.append(f"| {cf:g}x | {len(own)} | {', '.join(str(rank + 1) for rank in above)} |")
    if not ranks:
        raise of.missing
    data = {name: next(iter(measured[name].values())).key for name in panels}
    figure = accuracy_against_factor(
        [
            Panel(f"{of.arch}, {data[name].classes} classes, {where}", panels[name])
            for name, where in ((home, "chosen here"), (away, "unseen"))
        ],
        "params",
    )
    return Drawn(
        figure,
        (
            f"| params | random profiles | ranks on unseen data of the {TRANSFERRED} best |",
            "|---|---:|---:|",
            *rows,
        ),
        f"The paper, with ImageNet where this has TinyImageNet's classes: the best profiles of one "
        f"data set are among the best of another. Here: their median rank is in the top "
        f"{', '.join(f'{share:.0%}' for share in ranks)}; "
        f"{holds(all(share <= 0.2 for share in ranks))}.",
    )


def rewards(options: Options) -> Drawn:
    """Figures 9 to 11: a reward over accuracy and compression."""
    reference_groups(options.arch)  # the file is named for it
    name = REWARDS[options.figure]
    cf = 4.0
    shares, removed, values = landscape(name, cf)
    labels = "share of the base accuracy", "removed fraction"
    row, column = divmod(int(values.argmax()), len(shares))
    best = 1 / (1 - removed[row])
    return Drawn(
        reward_landscape(shares, removed, values, f"{name}, {cf:g}x", labels),
        (
            "| reward | greatest | at a share of the accuracy of | at a factor of |",
            "|---|---:|---:|---:|",
            f"| {name} | {values.max():.3f} | {shares[column]:.2f} | {best:.2f}x |",
        ),
        f"The paper: the Gaussian reward is greatest at the asked factor, the others grow with the "
        f"compression. Here: {name} is greatest at {best:.2f}x where {cf:g}x is asked; "
        f"{holds((name == 'gaussian') == (abs(best / cf - 1) < 0.05))}.",
    )


def over_time(options: Options) -> Drawn:
    """Figure 12: the rewards of PPO's episodes, where a ledger stands in for the network."""
    integer("--episodes", options.episodes, 1)
    if not options.seeds or min(options.seeds) < 0 or max(options.seeds) >= 2**32:
        raise ZooError(f"--seeds must be one or more numbers from 0 to 2**32 - 1: {options.seeds}.")
    benchmark = LedgerBenchmark(options.arch, ledger=options.ledger)
    runs = []
    for seed in options.seeds:
        played: list[float] = []
        agent("ppo")(
            benchmark.env(4.0),
            options.episodes,
            seed=seed,
            on_episode=lambda episode, played=played: played.append(episode["reward"]),
        )
        runs.append(played)
    tenth = max(1, options.episodes // 10)
    rows, rising = [], []
    for seed, played in zip(options.seeds, runs, strict=True):
        first, last = statistics.fmean(played[:tenth]), statistics.fmean(played[-tenth:])
        rising.append(last > first)
        rows.append(f"| {seed} | {first:.3f} | {last:.3f} | {max(played):.3f} |")
    return Drawn(
        reward_band(runs),
        (
            f"| seed | mean of the first {tenth} | of the last {tenth} | greatest |",
            "|---|---:|---:|---:|",
            *rows,
        ),
        f"The paper: the reward rises in training. Here, on accuracies that "
        f"{len(benchmark.profiles):,} evaluations predict: with {sum(rising)} of {len(rising)} "
        f"seeds; {holds(all(rising))}.",
    )


def short(row: Row) -> bool:
    """Whether the row's fine-tune is one epoch, as those of random profiles are."""
    return row.key.fidelity.startswith("fine-tune, 1 epochs of 10000 training images")


def random_and_short(row: Row) -> bool:
    return row.source == "random" and short(row)


def holds(claim: bool) -> str:
    return "the claim holds" if claim else "the claim does not hold"


FIGURES: dict[str, Callable[[Options], Drawn]] = {
    "fig1": initialisation,
    "fig2": channels,
    "fig3": handmade,
    "fig4": cloud,
    "fig6": transfer,
    **dict.fromkeys(REWARDS, rewards),
    "fig12": over_time,
}


def main(options: Options) -> None:
    """Write the image, and beside it the table and the verdict, which are printed too."""
    try:
        drawn = FIGURES[options.figure](options)
    except ZooError as error:
        raise SystemExit(str(error)) from None
    path = options.out / f"{options.figure}-{options.arch}.png"
    save(drawn.figure, path)
    text = "\n".join((*drawn.lines, "", drawn.verdict))
    path.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    print(text, "", path, sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
