from __future__ import annotations

import io
import re
import statistics
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import zoo
from zoo.common import plots
from zoo.errors import ZooError
from zoo.search.ledger import Key, Ledger, Row, read
from zoo.search.report import write_report
from zoo.search.summary import ledger_report, plot_ledger, summarise
from zoo.spec.cost import CostModel, CostTerm, cost_model
from zoo.spec.profile import Profile, Provenance, Reference
from zoo.tracing.known_groups import reference_groups

REGISTRY = Path(__file__).parents[2] / "registry"
MODEL = CostModel((10, 20), (CostTerm((0,), 3, 300), CostTerm((0, 1), 9, 9)))
FAST, SLOW = "recalibration", "fine-tune, 20 epochs"


def row(widths, accuracy, *, seed=0, source=None, network="a" * 64, fidelity=FAST, split="s"):
    key = Key(network, split, 10, 16, tuple(widths), "random", seed, fidelity)
    return Row(key, accuracy, 2.0, source)


def written(path: Path, rows) -> Path:
    with Ledger(path) as ledger:
        for item in rows:
            ledger.add(item)
    return path


def text_of(tables) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def line_with(text: str, *words: str) -> str:
    (line,) = (line for line in text.splitlines() if all(word in line for word in words))
    return line


def test_only_what_can_be_compared_is_counted_together():
    rows = [
        row((5, 5), 0.5),
        row((5, 5), 0.6, network="b"),
        row((5, 5), 0.7, fidelity=SLOW),
        row((5, 5), 0.8, split="z"),
        row((5, 5), 0.9, seed=1),
        row((5, 6), 0.1, seed=1),
    ]
    found = summarise(rows)
    assert [s.total.evaluations for s in found] == [1, 3, 1, 1]
    assert [s.setting.fidelity for s in found] == [SLOW, FAST, FAST, FAST]
    assert [s.setting.network[0] for s in found] == ["a", "a", "a", "b"]
    assert found[1].total.mean == pytest.approx(0.5)
    assert found[1].total.seconds == 6.0
    assert summarise([]) == []


def test_a_profile_stands_by_its_mean_over_seeds_not_by_its_luckiest():
    lucky = [row((9, 9), accuracy, seed=seed) for seed, accuracy in enumerate((0.9, 0.1, 0.2))]
    steady = [row((5, 5), accuracy, seed=seed) for seed, accuracy in enumerate((0.5, 0.6))]
    (summary,) = summarise([*lucky, *steady])
    first, second = summary.total.standings
    assert (first.widths, first.seeds, second.widths, second.seeds) == ((5, 5), 2, (9, 9), 3)
    assert (first.mean, second.mean) == pytest.approx((0.55, 0.4))
    assert second.sd == pytest.approx(statistics.stdev([0.9, 0.1, 0.2]))
    assert summarise(lucky[:1])[0].total.standings[0].sd == 0.0


def test_sources_share_a_profile_but_not_its_evaluations():
    rows = [
        row((5, 5), 0.5, source="ppo"),
        row((5, 5), 0.7, seed=1, source="random"),
        row((6, 6), 0.2, source="random"),
        row((7, 7), 0.3),
    ]
    (summary,) = summarise(rows)
    counts = {name: tally.evaluations for name, tally in summary.sources.items()}
    assert counts == {"not recorded": 1, "ppo": 1, "random": 2}
    assert sum(counts.values()) == summary.total.evaluations
    assert summary.total.standings[0].sources == ("ppo", "random")
    assert summary.sources["ppo"].standings[0].mean == 0.5
    assert [s.widths for s in summary.sources["random"].standings] == [(5, 5), (6, 6)]


def test_factors_are_of_both_metrics_at_the_reference_or_absent():
    (summary,) = summarise([row((5, 10), 0.5)], MODEL)
    factors = summary.total.standings[0].factors
    assert factors == {
        "params": pytest.approx((30 + 1800) / (15 + 450)),
        "macs": pytest.approx((3000 + 1800) / (1500 + 450)),
    }
    assert summarise([row((5, 10), 0.5)])[0].total.standings[0].factors == {}


def test_the_tables_give_numbers_spread_and_sources(tmp_path):
    rows = [
        row((5, 5), 0.5, source="ppo"),
        row((5, 5), 0.6, seed=1, source="ppo"),
        row((6, 6), 0.4, source="equal"),
        row((7, 7), 0.3, source="random"),
    ]
    text = text_of(ledger_report([written(tmp_path / "ledger.jsonl", rows)], top=2))
    assert line_with(text, FAST).split()[-5:] == ["4", "3", "55.00%", "45.00%", "8"]
    assert line_with(text, "1  random").split() == ["1", "random", "1", "1", "30.00%", "30.00%"]
    assert line_with(text, "5 5").split() == ["1", "ppo", "5", "5", "55.00%", "7.07%", "2"]
    assert line_with(text, "6 6").split() == ["1", "equal", "6", "6", "40.00%", "1"]
    assert "7 7" not in text
    assert "params" not in text


def test_a_committed_ledger_has_its_bundled_profile_at_its_factor():
    ledger, profile = REGISTRY / "ledger" / "cnet.parquet", REGISTRY / "cnet" / "params-cf4.json"
    widths = " ".join(map(str, Profile.read(profile).kept.values()))
    everything = text_of(ledger_report([ledger], "cnet", top=1000))
    text = text_of(ledger_report([ledger], "cnet", top=1000, cf=4))
    assert widths in text
    factors = [float(line.split()[-2][:-1]) for line in text.splitlines() if line.endswith("x ")]
    assert len(factors) > 50
    assert all(abs(factor / 4 - 1) <= 0.021 for factor in factors)
    assert everything.count("\n") > text.count("\n") * 2
    model = cost_model(reference_groups("cnet"))
    reached = [model.factor(row.key.widths, "params") for row in read([ledger])]
    ends = f"range from {min(reached):.2f}x to {max(reached):.2f}x"
    with pytest.raises(ZooError, match=f"at 40x params; they {re.escape(ends)}"):
        ledger_report([ledger], "cnet", cf=40)


def test_what_a_ledger_cannot_tell_is_asked_for(tmp_path):
    path = written(tmp_path / "ledger.jsonl", [row((5, 5), 0.5)])
    empty = written(tmp_path / "empty.jsonl", [])
    with pytest.raises(ZooError, match="No evaluation"):
        ledger_report([empty])
    with pytest.raises(ZooError, match="architecture"):
        ledger_report([path], cf=4)
    with pytest.raises(ZooError, match="architecture"):
        plot_ledger([path], None, tmp_path / "plot.png")
    with pytest.raises(ZooError, match=r"\[5, 5\].*cnet"):
        ledger_report([path], "cnet")
    with pytest.raises(ZooError, match=r"\[40, 5, 5, 5, 5, 5\].*cnet"):
        ledger_report([written(tmp_path / "w.jsonl", [row((40, 5, 5, 5, 5, 5), 0.5)])], "cnet")
    with pytest.raises(ZooError, match="Did you mean 'cnet'"):
        ledger_report([path], "cnett")
    with pytest.raises(ZooError, match="top must be an integer of at least 1, got 0"):
        ledger_report([path], top=0)
    assert not (tmp_path / "plot.png").exists()


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of every figure 4 that is drawn."""
    calls = []
    real = plots.accuracy_against_factor

    def record(panels, metric):
        calls.append((panels, metric))
        return real(panels, metric)

    monkeypatch.setattr(plots, "accuracy_against_factor", record)
    return calls


def test_figure_4_of_a_ledger_has_its_sources_the_bundled_profiles_and_the_base(tmp_path, drawn):
    kept = Profile.read(REGISTRY / "cnet" / "params-cf4.json").kept.values()
    rows = [
        row((32,) * 6, 0.8),
        row(kept, 0.7, source="choice"),
        row(kept, 0.6, seed=1, source="choice"),
        row((16,) * 6, 0.5, source="equal"),
        row(kept, 0.9, source="ppo", fidelity="z, what the search saw"),
    ]
    plot_ledger([written(tmp_path / "ledger.jsonl", rows)], "cnet", tmp_path / "plot.svg", "params")
    [([panel, seen], metric)] = drawn
    assert (metric, panel.base) == ("params", 0.8)
    assert panel.series["searched"] == panel.series["choice"]
    assert (len(seen.series["ppo"]), seen.series["searched"]) == (1, [])
    [(factor, accuracy)] = panel.series["searched"]
    assert (factor, accuracy) == (pytest.approx(4, rel=0.02), pytest.approx(0.65))
    assert [accuracy for _, accuracy in panel.series["equal"]] == [0.5]
    assert panel.series["not recorded"] == []
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    with pytest.raises(ZooError, match="latency"):
        plot_ledger([tmp_path / "ledger.jsonl"], "cnet", tmp_path / "plot.svg", "latency")


def profile(policy="searched", widths=(5, 10), **changes) -> Profile:
    made = Provenance(
        command="zoo search --arch tiny --cf 4",
        agent="ppo, scale projection",
        seed=3,
        episodes=3,
        evaluations=1234,
        seconds=567.8,
        tasks=("one (sha256 aa) on data",),
        split_digest="s",
        fidelity="search: recalibration",
        machine="a CPU",
        date="2020-01-01",
        versions={},
    )
    fields = {
        "architecture": "tiny",
        "metric": "params",
        "cf": 4.0,
        "got": MODEL.factor(widths, "params"),
        "reference": Reference(10, 32),
        "keep_ratios": {"first": widths[0] / 10, "second": widths[1] / 20},
        "kept": {"first": widths[0], "second": widths[1]},
        "policy": policy,
        "provenance": made if policy == "searched" else None,
    }
    return Profile(**{**fields, **changes})


EPISODES = [
    {"task": task, "cf": 4.0, "reward": reward, "factor": 3.98, "accuracy": reward / 2}
    for task, reward in (("one", 0.5), ("two", 0.9), ("one", 0.7))
]
ROWS = [
    row((5, 10), 0.61, source="ppo"),
    row((6, 9), 0.52, source="equal"),
    row((5, 10), 0.71, source="choice", fidelity=SLOW),
    row((8, 15), 0.79, source="choice", fidelity=SLOW),
]


def test_the_report_says_in_words_what_the_search_did(tmp_path, drawn):
    path = write_report(tmp_path, [profile()], EPISODES, ROWS, MODEL, {"a" * 64: 0.8})
    text = path.read_text()
    for words in (
        "# Search of tiny",
        "it chose params-cf4.json: 3.94x params, 2.46x macs",
        "ppo, scale projection, seed 3: 3 episodes and 1,234 evaluations in 568 s",
        "    zoo search --arch tiny --cf 4",
        "| two | 4x | 1 | 0.900 | 0.900 | 3.98x | 45.00% |",
        "| one | 4x | 2 | 0.600 | 0.700 | 3.98x | 35.00% |",
        "| first | 5 (0.500) |",
    ):
        assert words in text
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == [
        "rewards_cf4.png",
        "keep_ratios.png",
        "accuracy_params.png",
    ]
    assert "left out" not in text
    assert "8 15" not in text  # at 2x it is the better one
    for name in re.findall(r"\((\w+\.png)\)", text):
        assert min(Image.open(tmp_path / name).size) >= 400
    [([slow, fast], metric)] = drawn
    assert (metric, slow.base, fast.base) == ("params", 0.8, 0.8)
    assert [accuracy for _, accuracy in slow.series["searched"]] == [0.71]
    assert fast.series["searched"] == []
    assert [accuracy for _, accuracy in fast.series["equal"]] == [0.52]


def test_every_table_of_the_report_is_whole(tmp_path):
    text = write_report(tmp_path, [profile()], EPISODES, ROWS, MODEL, {}).read_text()
    tables = re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
        assert len(table.strip().splitlines()) > 2


def test_the_report_is_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        write_report(tmp_path / name, [profile()], EPISODES, ROWS, MODEL, {})
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert len(files) == 4
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}


def test_factors_are_not_mixed(tmp_path):
    chosen = [profile(), profile(cf=1.66, widths=(8, 15))]
    later = [{**info, "cf": 1.66} for info in EPISODES]
    text = write_report(tmp_path, chosen, [*EPISODES, *later], ROWS, MODEL, {}).read_text()
    for name in ("params-cf4", "params-cf1.66"):
        assert f"it chose {name}.json" in text
    four, less = text.split("at 1.66x params", 1)
    assert "5 10" in four
    assert "8 15" not in four
    assert "8 15" in less
    assert (tmp_path / "rewards_cf4.png").exists()
    assert (tmp_path / "rewards_cf1.66.png").exists()


def test_without_matplotlib_there_is_a_report_that_says_so(tmp_path, monkeypatch):
    monkeypatch.delattr(zoo.common, "plots")
    monkeypatch.delitem(sys.modules, "zoo.common.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write_report(tmp_path, [profile()], EPISODES, ROWS, MODEL, {})
    text = path.read_text()
    for name in ("rewards_cf4.png", "keep_ratios.png", "accuracy_params.png"):
        assert f"{name} was left out: Plots need matplotlib: pip install" in text
    assert "| 0.900 |" in text
    assert list(tmp_path.iterdir()) == [path]


def test_a_search_stopped_before_anything_was_found_still_has_a_report(tmp_path):
    text = write_report(tmp_path, [], [], [], MODEL, {}).read_text()
    assert "chose no profile" in text
    assert "|" not in text
