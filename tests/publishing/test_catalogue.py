"""The catalogue says what the registry says, and the verdicts what its rows say."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np
import pytest

import zoo
from zoo.publishing.catalogue import (
    CataloguedArchitecture,
    Exam,
    Row,
    catalogue,
    dominates,
    exam_rows,
)
from zoo.publishing.verdicts import limits, shows
from zoo.registry.store import list_architectures, stored_groups
from zoo.registry.weights import list_weights
from zoo.spec.cost import cost_model
from zoo.spec.profile import STANDARD, Evidence


@pytest.fixture(scope="module")
def architectures() -> dict[str, CataloguedArchitecture]:
    return {of.name: of for of in catalogue()}


def row(policy: str, mean: float, params: int, macs: int, sd: float = 0.001) -> Evidence:
    seeds = (0, 1)
    return Evidence(policy, params, macs, mean, sd, seeds, (mean, mean), "short", "set, test split")


def drawn(policy: str, accuracies: Sequence[float]) -> Evidence:
    of, seeds = [float(a) for a in accuracies], tuple(range(len(accuracies)))
    sd = statistics.stdev(of) if len(of) > 1 else 0.0
    mean = statistics.fmean(of)
    return Evidence(policy, 1, 1, mean, sd, seeds, tuple(of), "short", "set, test split")


def test_everything_in_the_registry_is_there_once(architectures) -> None:
    assert sorted(architectures) == sorted(list_architectures())
    references = [found.reference for of in architectures.values() for found in of.profiles]
    entries = [*zoo.list_profiles(), *zoo.list_profiles(source="published")]
    assert sorted(references) == sorted(entry.reference for entry in entries)
    weights = [own for of in architectures.values() for own in of.weights]
    assert sorted(own.reference for own in weights) == sorted(o.reference for o in list_weights())


def test_costs_are_those_of_the_stored_groups(architectures) -> None:
    for of in architectures.values():
        model = cost_model(stored_groups(of.name))
        assert of.cost == model.dense
        for found in of.profiles:
            assert found.cost == model(list(found.profile.kept.values()))
            nominal = {"params": found.params_factor, "macs": found.macs_factor}
            assert nominal[found.profile.metric] == pytest.approx(found.profile.got)


def test_every_evidence_row_is_in_exactly_one_exam(architectures) -> None:
    for of in architectures.values():
        for found in of.profiles:
            rows = [row.evidence for exam in found.exams for row in exam.rows]
            assert sorted(map(repr, rows)) == sorted(map(repr, found.profile.evidence))
            assert all(exam.base is None or not exam.base.dominated_by for exam in found.exams)


def test_stages_cover_all_layers_in_order(architectures) -> None:
    for of in architectures.values():
        covered = [n for s in of.stages for n in range(s.first, s.last + 1)]
        assert covered == list(range(len(of.layers)))
    sides = [stage.side for stage in architectures["resnet20-16"].stages]
    assert sides == [32, 16, 8]


def test_a_row_dominates_only_if_it_is_no_worse_in_all_three() -> None:
    best = row("a", 0.8, 100, 100)
    assert dominates(best, row("b", 0.7, 100, 100))
    assert dominates(best, row("b", 0.7, 99.5, 200))  # within 1 % of the parameters
    assert not dominates(best, row("b", 0.7, 90, 200))
    assert not dominates(best, row("b", 0.7, 200, 90))
    assert not dominates(best, row("b", 0.8, 200, 200))


def test_the_verdict_owns_up_to_rivals_that_did_better(architectures) -> None:
    found = architectures["resnet20-16"].profiles[0]
    searched, better, level = (
        row("searched", 0.7, 100, 100),
        row("x", 0.8, 90, 90),
        row("y", 0.7, 1, 1),
    )
    rows = tuple(Row(r, 1, 1, ("x",) if r is searched else ()) for r in (searched, better, level))
    assert found.profile.certificate is not None
    assert shows(found)[0] == found.profile.certificate.verdict
    bare = dataclasses.replace(found.profile, certificate=None)
    said = " ".join(shows(dataclasses.replace(found, profile=bare, exams=(Exam("set", "", rows),))))
    assert "behind `x` (-10.00 points)" in said
    assert "not told apart from `y`" in said
    assert "`x` did better with no more parameters and MACs" in said
    assert "ahead" not in said


@pytest.mark.parametrize("counts", [(2, 2), (3, 3), (5, 5), (8, 8), (5, 1)])
def test_equal_policies_are_called_ahead_or_behind_in_a_twentieth_of_cases(
    architectures, counts
) -> None:
    found, rng, trials = architectures["resnet20-16"].profiles[0], np.random.default_rng(0), 1000
    wrong = 0
    for _ in range(trials):
        own, other = (
            Row(drawn(policy, rng.normal(0.7, 0.01, count)), 1, 1, ())
            for policy, count in zip(("searched", "x"), counts, strict=True)
        )
        exams = (Exam("set", "", (own, other)),)
        wrong += "not told apart from `x`" not in " ".join(
            shows(dataclasses.replace(found, exams=exams))
        )
    assert wrong / trials == pytest.approx(0.05, abs=0.02)


def test_one_seed_each_tells_nothing_apart(architectures) -> None:
    rows = (Row(drawn("searched", [0.9]), 1, 1, ()), Row(drawn("x", [0.1]), 1, 1, ()))
    found = architectures["resnet20-16"].profiles[0]
    said = " ".join(shows(dataclasses.replace(found, exams=(Exam("set", "", rows),))))
    assert "not told apart from `x` (+80.00 points)" in said


def test_what_was_trained_longer_is_no_rival_of_what_was_not(architectures) -> None:
    found = architectures["resnet20-16"].profiles[0]
    evidence = (row("searched", 0.7, 100, 100), row(f"searched{STANDARD}", 0.8, 100, 100))
    model = cost_model(stored_groups("resnet20-16"))
    exam = Exam("set", "", exam_rows(list(evidence), model))
    assert [own.dominated_by for own in exam.rows] == [(), ()]
    said = " ".join(shows(dataclasses.replace(found, exams=(exam,))))
    assert "ahead of" not in said.partition("On set")[2]
    assert "behind" not in said
    assert "recipe `standard`, with the dense network as teacher: `searched` 80.00%" in said


def test_what_was_not_measured_is_said(architectures) -> None:
    for of in architectures.values():
        for found in of.profiles:
            said = " ".join(limits(of, found))
            if not found.exams:
                assert "Nothing about its accuracy was measured here" in said
                continue
            assert "one base network" in said
            for policy in ("global", "equal", "increasing"):
                missing = all(exam.row(policy) is None for exam in found.exams)
                assert (f"`{policy}`" in said.partition("Not among")[2]) == missing
