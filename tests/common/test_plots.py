from __future__ import annotations

import importlib
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

import zoo
from zoo.common import plots
from zoo.errors import ZooError
from zoo.training.finetuning import EpochRecord

SERIES = {
    "random": [(2.5, 0.4), (3.5, 0.3), (4.1, 0.25)],
    "equal": [(6.0, 0.2), (2.0, 0.5)],
    "ppo": [(4.0, 0.55)],
    "searched": [(4.0, 0.6), (2.0, 0.7)],
}


EPOCHS = [
    EpochRecord(epoch, loss, accuracy, 1.0)
    for epoch, loss, accuracy in ((1, 2.0, 0.3), (2, 1.5, None), (3, 1.2, 0.6))
]


def figure_4():
    return plots.accuracy_against_factor([plots.Panel("cifar10", SERIES, base=0.76)], "params")


def landscape():
    xs, ys = np.linspace(0, 1, 7), np.linspace(0, 2, 5)
    values = np.add.outer(ys, xs)
    return plots.reward_landscape(xs, ys, values, "gaussian", ("factor", "accuracy"))


FIGURES = {
    "figure 4": figure_4,
    "rewards": lambda: plots.reward_curve([0.1, 0.5, 0.3]),
    "β": lambda: plots.keep_ratios({"params-cf4": {"a": 0.5, "b": 1.0}}),
    "landscape": landscape,
    "training": lambda: plots.training_curves(EPOCHS),
}


def by_label(axes):
    return {artist.get_label(): artist for artist in [*axes.collections, *axes.lines]}


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_files_are_images_of_something_and_the_same_every_time(make, tmp_path):
    path, again = tmp_path / "new" / "a.png", tmp_path / "b.png"
    plots.save(make(), path)
    plots.save(make(), again)
    image = np.asarray(Image.open(path).convert("RGB"))
    assert min(image.shape[:2]) >= 400
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    assert (image != 255).any(axis=2).mean() > 0.005
    assert path.read_bytes() == again.read_bytes()


def test_svg_is_written_the_same_every_time_and_undated(tmp_path):
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        plots.save(figure_4(), path)
    assert ElementTree.parse(paths[0]).getroot().tag.endswith("svg")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"<dc:date>" not in paths[0].read_bytes()


@pytest.mark.parametrize("name", ["plot.jpeg", "plot"])
def test_another_suffix_is_refused_and_nothing_is_written(tmp_path, name):
    with pytest.raises(ZooError, match=r"Known: \.png, \.svg") as caught:
        plots.save(figure_4(), tmp_path / name)
    assert name in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_figure_4_shows_every_profile_where_it_is():
    axes = figure_4().axes[0]
    drawn = by_label(axes)
    assert set(drawn) == {*SERIES, "base"}
    for name in ("random", "ppo", "equal", "searched"):
        assert sorted(map(tuple, drawn[name].get_offsets())) == sorted(SERIES[name])
    assert set(drawn["base"].get_ydata()) == {0.76}
    assert {text.get_text() for text in axes.get_legend().get_texts()} == set(drawn)
    assert axes.get_xlabel() == "compression factor (params)"
    assert len({artist.get_zorder() for artist in drawn.values()}) == 1, "drawn in this order:"
    drawing = [a for a in axes.get_children() if a.get_label() in drawn]
    assert [drawing[1].get_label(), drawing[-1].get_label()] == ["random", "searched"]


def test_a_series_has_one_colour_in_all_panels_and_none_of_its_neighbours():
    names = [*SERIES, "greedy", "ddpg", "gnn", "cma-es", "genetic", "swarm", "annealing"]
    names += ["choice", "gate", "increasing", "decreasing", "not recorded"]
    every = {name: [(4.0, 0.5)] for name in names}
    some = {name: every[name] for name in ("cma-es", "random")}
    figure = plots.accuracy_against_factor(
        [plots.Panel("one", some), plots.Panel("two", every)], "macs"
    )
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    first, second = ({label: _colour(a) for label, a in by_label(x).items()} for x in figure.axes)
    assert set(first) == set(some)
    assert all(second[name] == colour for name, colour in first.items())
    assert len(set(second.values())) == len(names)


def _colour(artist):
    line = hasattr(artist, "get_xydata")
    return to_rgb(artist.get_color() if line else artist.get_facecolor()[0])


def test_many_panels_wrap_and_the_places_left_are_empty():
    panels = [plots.Panel(str(index), SERIES) for index in range(6)]
    figure = plots.accuracy_against_factor(panels, "params")
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == [panel.title for panel in panels]
    assert all(by_label(axes) for axes in shown)
    assert len(figure.axes) == 8


def test_the_reward_curve_has_each_episode_the_running_mean_and_the_best_so_far():
    rewards = np.random.default_rng(0).normal(size=50)
    scatter, mean, best = (
        by_label(plots.reward_curve(list(rewards), window=8).axes[0])[label]
        for label in ("episode", "mean of the last 8", "best so far")
    )
    np.testing.assert_allclose(scatter.get_offsets()[:, 1], rewards)
    assert scatter.get_offsets()[:, 0].tolist() == list(range(1, 51))
    expected = [rewards[max(0, n - 8) : n].mean() for n in range(1, 51)]
    np.testing.assert_allclose(mean.get_ydata(), expected)
    np.testing.assert_allclose(best.get_ydata(), [rewards[:n].max() for n in range(1, 51)])


def test_keep_ratios_stand_side_by_side_over_their_own_group():
    profiles = {"searched": {"a": 0.2, "b": 0.9}, "equal": {"b": 0.5, "a": 0.5}}
    axes = plots.keep_ratios(profiles).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {"searched": [0.2, 0.9], "equal": [0.5, 0.5]}
    edges = [
        (bar.get_x(), bar.get_x() + bar.get_width()) for bars in axes.containers for bar in bars
    ]
    edges.sort()
    assert all(left[1] <= right[0] + 1e-9 for left, right in pairwise(edges))
    assert [round(sum(edge) / 2) for edge in edges] == [0, 0, 1, 1]


def test_the_landscape_spans_its_axes_and_its_values():
    figure = landscape()
    axes, bar = figure.axes
    assert axes.dataLim.extents.tolist() == [0, 0, 1, 2]
    filled = axes.collections[0]
    assert filled.get_clim() == pytest.approx((0, 3), abs=0.2)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("factor", "accuracy")
    assert (axes.get_title(), bar.get_ylabel()) == ("gaussian", "reward")
    half = filled.get_paths()[len(filled.levels) // 2].vertices
    assert half.sum(axis=1) == pytest.approx(1.5, abs=0.2), "the level set x + y = 1.5"


def test_the_training_curves_are_the_losses_and_the_accuracies_that_were_measured():
    figure = plots.training_curves(EPOCHS)
    losses, accuracies = (axes.lines[0].get_xydata().tolist() for axes in figure.axes)
    assert losses == [[1, 2.0], [2, 1.5], [3, 1.2]]
    assert accuracies == [[1, 0.3], [3, 0.6]]
    unmeasured = plots.training_curves([EpochRecord(1, 2.0, None, 1.0)])
    assert len(unmeasured.axes) == 1
    with pytest.raises(ZooError, match="No epoch"):
        plots.training_curves([])


def test_nothing_to_plot_is_an_error_and_so_are_profiles_of_different_groups():
    with pytest.raises(ZooError, match="no profile"):
        plots.accuracy_against_factor([plots.Panel("empty", {})], "params")
    with pytest.raises(ZooError, match="No episode"):
        plots.reward_curve([])
    with pytest.raises(ZooError, match="no profile"):
        plots.keep_ratios({})
    with pytest.raises(ZooError, match="one and two"):
        plots.keep_ratios({"one": {"a": 1.0}, "two": {"b": 1.0}})


def test_plotting_leaves_no_figure_open():
    from matplotlib import pyplot

    for make in FIGURES.values():
        make()
    assert pyplot.get_fignums() == []


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(zoo, "plots", plots, raising=False)
    monkeypatch.delitem(sys.modules, "zoo.common.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ZooError, match=r"pip install 'prunezoo\[plots\]'"):
        importlib.import_module("zoo.common.plots")
