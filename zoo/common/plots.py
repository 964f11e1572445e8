"""The paper's figures, drawn with Matplotlib: the only module that imports it.

Each function returns a new `Figure` and touches no global state; `save` writes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from zoo.errors import ZooError, unknown

try:
    from matplotlib import colormaps, rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError:
    raise ZooError("Plots need matplotlib: pip install 'prunezoo[plots]'.") from None

__all__ = [
    "SUFFIXES",
    "Panel",
    "accuracy_against_factor",
    "accuracy_against_size",
    "accuracy_by_factor",
    "keep_ratios",
    "reward_band",
    "reward_curve",
    "reward_landscape",
    "save",
    "training_curves",
]

SUFFIXES = (".png", ".svg")

SQUARES = ("equal", "increasing", "decreasing", "greedy")
"""Series with few profiles at each factor, drawn as squares; the others are clouds of points."""

COLOURS = {"random": "silver", "searched": "deeppink", "equal": "black", "greedy": "darkgreen"}
"""Colours that are the same in every plot; other series take the next of twenty."""

COLUMNS = 4
"""Maximum number of panels in a row."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One panel of figure 4: profiles of one network on one data set.

    Attributes:
        title: above the panel.
        series: name -> (compression factor, accuracy in [0, 1]) of its profiles.
        base: accuracy of the dense network; None draws no line.
    """

    title: str
    series: Mapping[str, Points]
    base: float | None = None


def accuracy_against_factor(panels: Sequence[Panel], metric: str) -> Figure:
    """The paper's figure 4: accuracy against the factor of `metric`, with `searched` on top.

    Raises:
        ZooError: when there is nothing to show.
    """
    if not any(points for panel in panels for points in panel.series.values()):
        raise ZooError("There is no profile to plot the accuracy of.")
    names = sorted({name for panel in panels for name in panel.series}, key=_depth)
    others = [name for name in names if name not in COLOURS]
    many = colormaps["tab20"](range(20))
    colours = {**COLOURS, **{name: many[index % 20] for index, name in enumerate(others)}}
    columns = min(len(panels), COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6, 4 * columns), 4 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        axes.set(title=panel.title, xlabel=f"compression factor ({metric})", ylabel="accuracy")
        if panel.base is not None:
            axes.axhline(panel.base, color="grey", linestyle="--", label="base")
        for name in names:
            if panel.series.get(name):
                _draw(axes, name, panel.series[name], colours[name])
        axes.legend()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def accuracy_by_factor(
    title: str, series: Mapping[str, Mapping[float, Sequence[float]]], metric: str
) -> Figure:
    """The paper's figures 1 to 3: a line per series, with its standard deviation at every factor.

    Args:
        title: above the plot.
        series: name -> compression factor -> accuracies in [0, 1], one per seed.
        metric: of the factor.

    Raises:
        ZooError: when there is nothing to show.
    """
    if not any(series.values()):
        raise ZooError("There is no accuracy to plot.")
    figure, axes = _single(f"compression factor ({metric})", "accuracy")
    axes.set_title(title)
    for index, (name, points) in enumerate(series.items()):
        factors = sorted(points)
        means = [float(np.mean(points[cf])) for cf in factors]
        spreads = [float(np.std(points[cf], ddof=min(1, len(points[cf]) - 1))) for cf in factors]
        colour = COLOURS.get(name, f"C{index}")
        axes.errorbar(factors, means, spreads, marker="o", capsize=3, color=colour, label=name)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend()
    return figure


def accuracy_against_size(title: str, series: Mapping[str, Points], dense: float) -> Figure:
    """One line per policy, each point labelled; the dense network is a dashed line.

    Args:
        title: above the plot.
        series: policy -> (parameters, accuracy in [0, 1]) of its profiles.
        dense: accuracy of the dense network, in [0, 1].
    """
    figure, axes = _single("parameters, in thousands", "accuracy")
    axes.set_title(title)
    axes.axhline(dense, color="grey", linestyle="--")
    axes.annotate(f"dense {dense:.1%}", (0, dense), xycoords=("axes fraction", "data"), va="bottom")
    axes.margins(0.08, 0.12)
    for index, (name, points) in enumerate(series.items()):
        sizes, accuracies = zip(*sorted(points), strict=True)
        # The first line is the upper one: its labels go above it, others below.
        colour, drop = COLOURS.get(name), 12 if index else -6
        thousands = [size / 1000 for size in sizes]
        axes.plot(thousands, accuracies, "o-", color=colour, label=name)
        for at in zip(thousands, accuracies, strict=True):
            axes.annotate(
                f"{at[1]:.1%}", at, (0 if drop < 0 else 10, -drop), textcoords="offset points",
                ha="center", va="bottom" if drop < 0 else "center", color=colour,
            )  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend()
    return figure


def _depth(name: str) -> tuple[bool, bool, str]:
    """Sort key of drawing: `random` at the bottom, `searched` on top."""
    return name == "searched", name != "random", name


def _draw(axes: Axes, name: str, points: Points, colour: Any) -> None:
    factors, accuracies = zip(*sorted(points), strict=True)
    marker = "s" if name in SQUARES else "o"
    size = {"searched": 80, **dict.fromkeys(SQUARES, 36)}.get(name, 16)
    axes.scatter(factors, accuracies, size, color=colour, label=name, marker=marker, zorder=2)


def reward_curve(rewards: Sequence[float], window: int = 32) -> Figure:
    """The reward of each episode in order, its mean over the last `window`, and the best so far.

    Raises:
        ZooError: for no rewards.
    """
    if not len(rewards):
        raise ZooError("No episode was finished: there is no reward to plot.")
    values = np.asarray(rewards, dtype=float)
    episodes = np.arange(1, len(values) + 1)
    first = np.maximum(0, episodes - window)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[episodes] - sums[first]) / (episodes - first)
    figure, axes = _single("episode", "reward")
    axes.scatter(episodes, values, s=8, color="silver", label="episode")
    axes.plot(episodes, means, color="C0", label=f"mean of the last {window}")
    axes.plot(episodes, np.maximum.accumulate(values), color="deeppink", label="best so far")
    axes.legend()
    return figure


def reward_band(runs: Sequence[Sequence[float]], window: int = 32) -> Figure:
    """The paper's figure 12: the mean reward over time, with the least and the greatest as a band.

    Args:
        runs: the rewards of every run's episodes in order; all as many.
        window: episodes that one point of the plot is about.

    Raises:
        ZooError: for no rewards.
    """
    count = min(map(len, runs), default=0) // window
    if not count:
        raise ZooError(f"There are no {window} episodes to plot.")
    values = np.array([run[: count * window] for run in runs], dtype=float)
    values = values.reshape(len(runs), count, window)
    episodes = window * np.arange(1, count + 1)
    figure, axes = _single("episode", "reward")
    least, most = values.min(axis=(0, 2)), values.max(axis=(0, 2))
    axes.fill_between(episodes, least, most, color="pink", label="least to greatest")
    axes.plot(episodes, values.mean(axis=(0, 2)), color="deeppink", label="mean")
    axes.legend()
    return figure


def keep_ratios(profiles: Mapping[str, Mapping[str, float]]) -> Figure:
    """The keep ratio β of every channel group, with one bar per profile.

    Args:
        profiles: label -> group name -> β; all must have the same groups.

    Raises:
        ZooError: for no profiles, or profiles of different groups.
    """
    if not profiles:
        raise ZooError("There is no profile to plot the keep ratios of.")
    first, *rest = profiles
    groups = list(profiles[first])
    for other in rest:
        if set(profiles[other]) != set(groups):
            raise ZooError(f"{first} and {other} cannot share a plot: their groups differ.")
    figure, axes = _single("channel group", "keep ratio β", width=max(6.0, 0.6 * len(groups)))
    thickness = 0.8 / len(profiles)
    for index, (label, ratios) in enumerate(profiles.items()):
        offset = (index - (len(profiles) - 1) / 2) * thickness
        heights = [ratios[name] for name in groups]
        axes.bar(np.arange(len(groups)) + offset, heights, thickness, label=label)
    axes.set_xticks(range(len(groups)), groups, rotation=45, ha="right")
    axes.set_ylim(0, 1)
    figure.legend(loc="outside upper center", ncols=COLUMNS)
    return figure


class Epoch(Protocol):
    """One epoch of a training: its number, mean loss, and accuracy in [0, 1] or None."""

    @property
    def epoch(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def accuracy(self) -> float | None: ...


def training_curves(history: Sequence[Epoch]) -> Figure:
    """The training loss of every epoch and, on an axis of its own, the validation accuracy.

    Raises:
        ZooError: for an empty history.
    """
    if not history:
        raise ZooError("No epoch was finished: there are no curves to plot.")
    figure, losses = _single("epoch", "training loss")
    losses.plot([r.epoch for r in history], [r.loss for r in history], ".-", color="C0")
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.yaxis.label.set_color("C0")
    measured = [(r.epoch, r.accuracy) for r in history if r.accuracy is not None]
    if measured:
        accuracies = losses.twinx()
        accuracies.plot(*zip(*measured, strict=True), ".-", color="deeppink")
        accuracies.set_ylabel("validation accuracy", color="deeppink")
    return figure


def reward_landscape(
    xs: ArrayLike, ys: ArrayLike, values: ArrayLike, title: str, labels: tuple[str, str]
) -> Figure:
    """A reward as contours over two quantities, as in the paper's figures 9 to 11.

    Args:
        xs, ys: coordinates of shapes (X,) and (Y,), or both (Y, X).
        values: of shape (Y, X).
        title: above the plot.
        labels: of the two axes.
    """
    figure, axes = _single(*labels)
    axes.set_title(title)
    filled = axes.contourf(xs, ys, values, levels=20)
    figure.colorbar(filled, ax=axes, label="reward")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the suffix of `path`; equal figures give equal files.

    Raises:
        ZooError: for another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise unknown(f"kind of image for {path.name}:", path.suffix, SUFFIXES)
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"Date": None} if path.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "zoo", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=120, metadata=undated)


def _single(xlabel: str, ylabel: str, width: float = 6.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes
