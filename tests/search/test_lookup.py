"""The registry's evaluations, looked up and searched in without training."""

from __future__ import annotations

import dataclasses
import statistics

import numpy as np
import pytest

import zoo
from zoo.errors import FactorError, ZooError
from zoo.planning.solver import scale_curve, solve
from zoo.search.agents import agent
from zoo.search.ledger import TEST, Key, Ledger, Row, read
from zoo.search.ledger_benchmark import LedgerBenchmark
from zoo.search.lookup import evaluated_profiles, ledger_path
from zoo.search.tasks import Candidate
from zoo.spec.cost import cost_model
from zoo.tracing.known_groups import reference_groups

ARCH = "cnet"
GROUPS = reference_groups(ARCH)
KEY = Key("base", "split", 10, 16, GROUPS.sizes, "random", 7, "recalibration, 8 images")


@pytest.fixture(scope="module")
def benchmark() -> LedgerBenchmark:
    """Of a base network with profiles from everywhere; later ones have those of searches alone,
    which lie close together and are harder to rank."""
    return LedgerBenchmark(ARCH, network="01445631", fidelity="recalibration")


@pytest.fixture
def ledger(tmp_path):
    """Three profiles of which one has two draws; it was fine-tuned, and measured with l1, too."""
    half = tuple(size // 2 for size in GROUPS.sizes)
    most = (half[0], *GROUPS.sizes[1:])
    rows = [
        Row(KEY, 0.9, 1.0),
        Row(dataclasses.replace(KEY, widths=half), 0.3, 1.0),
        Row(dataclasses.replace(KEY, widths=half, seed=8), 0.5, 1.0),
        Row(dataclasses.replace(KEY, widths=most), 0.7, 1.0),
        Row(dataclasses.replace(KEY, widths=half, fidelity="fine-tune, 1 epoch"), 0.8, 9.0),
        Row(dataclasses.replace(KEY, widths=half, criterion="l1"), 0.9, 1.0),
    ]
    with Ledger(tmp_path / "ledger.jsonl") as written:
        for row in rows:
            written.add(row)
    return tmp_path / "ledger.jsonl"


def test_the_nearest_are_those_of_the_least_distance_to_all_that_the_ledger_holds():
    wanted = zoo.get_profile(f"bundled:{ARCH}/params-cf4")
    found = zoo.ledger_lookup(ARCH, wanted, nearest=7)
    ratios = np.array(list(wanted.keep_ratios.values()))
    every = sorted(
        float(np.linalg.norm(ratios - list(each.keep_ratios.values()))) / len(ratios) ** 0.5
        for each in evaluated_profiles(ARCH)
    )
    assert [each.distance for each in found] == pytest.approx(every[: len(found)])
    assert len({tuple(each.kept.values()) for each in found}) == 7
    assert len(found) > 7  # the profile itself was measured in several ways
    first = found[0]
    own = [
        row.accuracy
        for row in read([ledger_path(ARCH)])
        if row.key.widths == tuple(first.kept.values())
        and (row.key.network, row.key.fidelity)
        == (first.measurement.network, first.measurement.fidelity)
    ]
    assert len(own) == first.draws
    assert first.accuracy == pytest.approx(statistics.fmean(own))


def test_a_bundled_profile_was_itself_evaluated():
    for entry in zoo.list_profiles(arch=ARCH):
        assert zoo.ledger_lookup(ARCH, entry.reference, nearest=1)[0].distance < 1e-9


def test_draws_are_averaged_and_measurements_kept_apart(ledger):
    half = dict.fromkeys(GROUPS.names, 0.5)
    first, second, *rest = zoo.ledger_lookup(ARCH, half, nearest=9, ledger=ledger)
    assert {(e.accuracy, e.draws) for e in (first, second)} == {(0.4, 2), (0.8, 1)}
    assert len(rest) == 2
    assert rest[0].distance < rest[1].distance
    (tuned,) = zoo.ledger_lookup(ARCH, half, fidelity="fine-tune", ledger=ledger)
    assert tuned.accuracy == 0.8
    in_order = zoo.ledger_lookup(ARCH, tuple(half.values()), fidelity="fine-tune", ledger=ledger)
    assert in_order == [tuned]


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ((0.5,), {}, "One keep ratio in .0, 1. is needed"),
        ((0.0,) * len(GROUPS.names), {}, "One keep ratio in .0, 1. is needed"),
        ((float("nan"),) * len(GROUPS.names), {}, "One keep ratio in .0, 1. is needed"),
        (("many",) * len(GROUPS.names), {}, "One keep ratio in .0, 1. is needed"),
        ({"stem": 0.5}, {}, "Keep ratios are needed for conv1"),
        ("bundled:cnet/params-cf9", {}, "cf9"),
        ((0.5,) * len(GROUPS.names), {"network": "zzz"}, "no evaluations of cnet whose base"),
        ((0.5,) * len(GROUPS.names), {"nearest": 0}, "nearest"),
    ],
)
def test_what_cannot_be_looked_up_says_why(asked, options, message):
    with pytest.raises(ZooError, match=message):
        zoo.ledger_lookup(ARCH, asked, **options)


def test_an_architecture_without_evaluations_and_a_ledger_of_another_say_so(ledger):
    with pytest.raises(ZooError, match="no evaluations of resnet110"):
        zoo.ledger_lookup("resnet110", "bundled:resnet20-16/params-cf4")
    with pytest.raises(ZooError, match="of another network than resnet20"):
        zoo.ledger_lookup("resnet20", (0.5,) * 13, ledger=ledger)


def test_the_benchmark_ranks_profiles_that_it_was_not_fitted_to(benchmark):
    everywhere, better = benchmark.held_out()
    assert everywhere > 0.9
    assert better > 0.8
    assert len(benchmark.profiles) == max(
        len(LedgerBenchmark(ARCH, network=network, fidelity="recalibration").profiles)
        for network in {each.measurement.network for each in benchmark.profiles}
    )


def test_a_benchmark_near_a_factor_is_of_such_profiles_alone():
    cost, whole = cost_model(GROUPS), LedgerBenchmark(ARCH)
    near = LedgerBenchmark(ARCH, near=("params", 4.0))
    assert 0 < len(near.profiles) < len(whole.profiles)
    for each in near.profiles:
        assert cost.factor(tuple(each.kept.values()), "params") == pytest.approx(4.0, rel=0.1)
    with pytest.raises(FactorError, match="No profile of cnet near 40x params was measured"):
        LedgerBenchmark(ARCH, near=("params", 40.0))


def test_test_images_are_marked_and_no_benchmark_is_fitted_to_them(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as written:
        written.add(Row(dataclasses.replace(KEY, split=f"{TEST}split"), 0.9, 1.0))
        with pytest.raises(FactorError, match="No profile of cnet was measured on validation"):
            LedgerBenchmark(ARCH, ledger=written.path)
        for width in (2, 4):
            half = tuple(size // width for size in GROUPS.sizes)
            written.add(Row(dataclasses.replace(KEY, widths=half), 1 / width, 1.0))
    kept = LedgerBenchmark(ARCH, ledger=written.path).profiles
    assert {each.accuracy for each in kept} == {0.5, 0.25}
    found = zoo.ledger_lookup(ARCH, (1.0,) * len(GROUPS.names), ledger=written.path)
    assert [each.measurement.on_test for each in found] == [True, False, False]


def test_the_final_evidence_of_the_registry_is_of_test_images():
    """What the profiles' files say of the test split stands so in the ledgers, and nowhere else."""
    matched = 0
    for arch in {entry.architecture for entry in zoo.list_profiles()}:
        if not ledger_path(arch).is_file():
            continue
        rows = read([ledger_path(arch)])
        for entry in zoo.list_profiles(arch=arch):
            profile = zoo.get_profile(entry.reference)
            for told in profile.evidence if isinstance(profile, zoo.Profile) else ():
                for row in rows:
                    same = (row.key.network, row.accuracy) == (told.network, told.accuracies[0])
                    if same and told.policy == "searched" == row.source:
                        assert row.key.split.startswith(TEST)
                        matched += 1
    assert matched > 10


def test_a_search_on_the_benchmark_finds_better_than_equal_and_repeats(benchmark):
    def search() -> list[dict]:
        played: list[dict] = []
        agent("cma-es")(benchmark.env(4.0), 160, seed=1, on_episode=played.append)
        return played

    played = search()
    cost = cost_model(GROUPS)
    for episode in played[:20]:
        factor = cost.total(GROUPS.sizes, "params") / cost.total(episode["widths"], "params")
        assert factor == pytest.approx(4.0, rel=0.01)
    best = max(played, key=lambda episode: episode["reward"])
    widths = solve(cost, scale_curve([1.0] * len(GROUPS.names)), 4.0, "params").widths
    (alike,) = benchmark.evaluate([Candidate(benchmark.task, widths, 0)])
    assert best["accuracy"] > alike
    assert [episode["widths"] for episode in search()] == [e["widths"] for e in played]
