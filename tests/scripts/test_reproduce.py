"""scripts/reproduce.py: what its tables and verdicts say follows from the evaluations."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import reproduce
from PIL import Image

from zoo.planning.policies import policy_solution
from zoo.search.fidelities import FineTuning, FromScratch
from zoo.search.ledger import TEST, Key, Ledger, Row, read
from zoo.search.stages import SHORT
from zoo.spec.cost import cost_model
from zoo.tracing.known_groups import reference_groups

pytest.importorskip("pyarrow")

ARCH = "cnet"
COST = cost_model(reference_groups(ARCH))
LONG, NEW = FineTuning.of(10, 10_000, 0.05), FromScratch.of(10, 10_000, 0.05)
HOME, AWAY = "a" * 64, "b" * 64


def widths(policy: str, cf: float, seed: int = 0) -> tuple[int, ...]:
    return policy_solution(policy, COST, cf, "params", seed).widths


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """New weights lose 3 points; l1 gains one; decreasing loses 5; the random clouds are shifted.

    Of the profiles that are random, those of a low number are good on both base networks.
    """

    def add(policy, seed, accuracy, fidelity, *, cf, criterion="random", network=HOME, number=0):
        kept = widths("random" if policy == "searched" else policy, cf, number)
        key = Key(network, "split", 10, 16, kept, criterion, seed, fidelity)
        written.add(Row(key, accuracy, 1.0, policy))

    with Ledger(tmp_path / "ledger.jsonl") as written:
        for cf, seed in itertools.product((1.5, 2.0), (0, 1)):
            level = 0.7 - cf / 50 + seed / 500
            add("equal", seed, level, LONG.name, cf=cf)
            add("equal", seed, level - 0.03, NEW.name, cf=cf)
            add("equal", seed, level + 0.01, LONG.name, cf=cf, criterion="l1")
            add("equal", seed, level, LONG.name, cf=cf, criterion="taylor")
            add("equal", seed, level, SHORT.name, cf=cf)
            add("increasing", seed, level + 0.02, SHORT.name, cf=cf)
            add("decreasing", seed, level - 0.05, SHORT.name, cf=cf)
        for cf, number in itertools.product((1.5, 2.0), range(20)):
            good = 0.6 - number / 50
            for network, level in ((HOME, good), (AWAY, good - 0.1)):
                if (network, number) != (AWAY, 19):
                    add("random", number, level, SHORT.name, cf=cf, network=network, number=number)
        for seed, accuracy in enumerate((0.54, 0.56)):
            add("searched", seed, accuracy, SHORT.name, cf=2.0, number=40)
            add("searched", seed, 0.9, LONG.name, cf=2.0, number=40)
    return written.path


def told(figure: str, ledger: Path, tmp_path: Path, capsys, **options) -> str:
    asked = reproduce.Options(figure, ARCH, ledger, (1.5, 2.0), out=tmp_path / "out", **options)
    reproduce.main(asked)
    with Image.open(tmp_path / "out" / f"{figure}-{ARCH}.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / f"{figure}-{ARCH}.md").read_text() in printed
    return printed


def test_figure_1_says_how_far_new_weights_are_away(ledger, tmp_path, capsys):
    text = told("fig1", ledger, tmp_path, capsys)
    assert "| weights of the base network | 67.10% ± 0.14 (2) | 66.10% ± 0.14 (2) |" in text
    assert "-3.0 points at 1.5x, -3.0 points at 2x; the claim does not hold" in text


def test_figure_2_compares_every_choice_of_channels_with_random_ones(ledger, tmp_path, capsys):
    text = told("fig2", ledger, tmp_path, capsys)
    assert "l1 against random, +1.0 points at 1.5x, +1.0 points at 2x" in text
    assert "taylor against random, +0.0 points at 1.5x" in text
    assert "nothing is more than 1.0 points away from random; the claim does not hold" in text


def test_figure_3_leaves_evaluations_of_other_fine_tunes_and_networks_out(ledger, tmp_path, capsys):
    text = told("fig3", ledger, tmp_path, capsys)
    assert "decreasing against equal, -5.0 points at 1.5x, -5.0 points at 2x" in text
    assert "| equal | 67.10% ± 0.14 (2) |" in text
    (random,) = [line for line in text.splitlines() if line.startswith("| random")]
    assert "(20)" in random


def test_figure_3_does_without_a_policy_that_does_not_reach_the_factors(tmp_path, capsys):
    with Ledger(tmp_path / "few.jsonl") as written:
        for policy, seed, accuracy in (("equal", 0, 0.6), ("increasing", 0, 0.61)):
            key = Key(HOME, "split", 10, 16, widths(policy, 2.0), "random", seed, SHORT.name)
            written.add(Row(key, accuracy, 1.0, policy))
    text = told("fig3", written.path, tmp_path, capsys)
    assert "decreasing against equal, out of reach; the others are up to 1.0 points away" in text


def test_figure_4_counts_the_profiles_near_the_best_and_above_the_searched(
    ledger, tmp_path, capsys
):
    text = told("fig4", ledger, tmp_path, capsys)
    assert "| 1.5x | 20 | 22.00% | 41.00% | 60.00% | 5% |  |" in text
    assert "| 2x | 20 | 22.00% | 41.00% | 60.00% | 5% | 55.00% |" in text
    assert "the claim holds. As good as the one searched on another base network: 15% at 2x" in text


def test_figure_4_leaves_profiles_made_by_macs_out(ledger, tmp_path, capsys):
    near = (
        kept
        for seed in range(1000)
        for kept in [policy_solution("random", COST, 1.5, "macs", seed).widths]
        if 0.005 < abs(COST.factor(kept, "params") / 1.5 - 1) < 0.02
    )
    key = Key(HOME, "split", 10, 16, next(near), "random", 77, SHORT.name)
    with Ledger(ledger) as written:
        written.add(Row(key, 0.99, 1.0, "random"))
    assert "| 1.5x | 20 | 22.00% | 41.00% | 60.00% |" in told("fig4", ledger, tmp_path, capsys)


def test_figure_4_takes_the_test_images_of_as_many_profiles(ledger, tmp_path, capsys):
    rows = [row for row in read([ledger]) if row.source == "random" and row.key.network == HOME]
    with Ledger(ledger) as written:
        for row in rows:
            key = dataclasses.replace(row.key, network="exam", split=f"{TEST}split")
            written.add(dataclasses.replace(row, key=key, accuracy=row.accuracy / 2))
    assert "| 1.5x | 20 | 11.00% | 20.50% | 30.00% |" in told("fig4", ledger, tmp_path, capsys)


def test_figure_4_has_no_verdict_on_a_handful_of_profiles(tmp_path):
    with Ledger(tmp_path / "few.jsonl") as written:
        for source, seed in (("random", 0), ("searched", 1)):
            kept = widths("random", 2.0, seed)
            key = Key(HOME, "split", 10, 16, kept, "random", seed, SHORT.name)
            written.add(Row(key, 0.5, 1.0, source))
    with pytest.raises(SystemExit, match="No factor has 10 random profiles of cnet yet"):
        reproduce.main(reproduce.Options("fig4", ARCH, written.path, (2.0,), out=tmp_path))


def test_figure_6_ranks_the_best_of_one_network_on_another(ledger, tmp_path, capsys):
    text = told("fig6", ledger, tmp_path, capsys)
    assert "| 2x | 19 | 1, 2, 3, 4, 5 |" in text
    assert "the claim holds" in text


@pytest.mark.parametrize(
    ("figure", "factor"), [("fig9", "4.04x"), ("fig10", "101.00x"), ("fig11", "101.00x")]
)
def test_figures_9_to_11_say_where_a_reward_is_greatest(figure, factor, ledger, tmp_path, capsys):
    text = told(figure, ledger, tmp_path, capsys)
    assert f"greatest at {factor} where 4x is asked; the claim holds" in text


def test_figure_12_plays_ppo_on_the_registrys_evaluations(tmp_path, capsys):
    text = told("fig12", None, tmp_path, capsys, seeds=(0,), episodes=64)
    assert "| 0 | 0." in text
    assert "of 1 seeds" in text.replace("with 0 ", "").replace("with 1 ", "")


def test_what_was_not_measured_yet_is_said(ledger, tmp_path):
    with Ledger(tmp_path / "none.jsonl"):
        pass
    asked = [
        reproduce.Options("fig3", ARCH, tmp_path / "none.jsonl", out=tmp_path),
        *(reproduce.Options(f"fig{n}", ARCH, ledger, (6.0,), out=tmp_path) for n in (1, 2, 3, 6)),
    ]
    for options in asked:
        with pytest.raises(SystemExit, match="not there yet"):
            reproduce.main(options)


def test_no_verdict_on_equal_profiles_alone(tmp_path):
    with Ledger(tmp_path / "few.jsonl") as written:
        for seed, fidelity in ((0, SHORT), (1, LONG), (2, NEW)):
            key = Key(HOME, "split", 10, 16, widths("equal", 2.0), "random", seed, fidelity.name)
            written.add(Row(key, 0.6, 1.0, "equal"))
    for figure in ("fig2", "fig3"):
        with pytest.raises(SystemExit, match="not there yet"):
            reproduce.main(reproduce.Options(figure, ARCH, written.path, (2.0,), out=tmp_path))
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("figure", "options", "message"),
    [
        ("fig4", {"cf": (3.3,)}, "No factor has 10 random profiles"),
        ("fig1", {"arch": "resnet20"}, "which do not fit resnet20"),
        ("fig4", {"arch": "resnet20"}, "which do not fit resnet20"),
        ("fig9", {"arch": "nosuch"}, "Unknown architecture 'nosuch'"),
        ("fig12", {"episodes": 0}, "--episodes must be an integer of at least 1"),
        ("fig12", {"seeds": ()}, "--seeds must be one or more"),
        ("fig12", {"seeds": (-1,)}, "--seeds must be one or more"),
        ("fig12", {"seeds": (2**32,)}, "--seeds must be one or more"),
    ],
)
def test_options_that_no_figure_can_be_drawn_by(ledger, tmp_path, figure, options, message):
    settings = {"arch": ARCH, "ledger": ledger, "out": tmp_path / "out", **options}
    with pytest.raises(SystemExit, match=message):
        reproduce.main(reproduce.Options(figure, **settings))
    assert not (tmp_path / "out").exists()
