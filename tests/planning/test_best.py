"""`best`, the default: the searched profile where there is one, else the best that can be had."""

from __future__ import annotations

import copy
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import zoo
from zoo.cli import main
from zoo.errors import DocumentError, FactorError, GraphError, ZooError
from zoo.models import build_model
from zoo.planning.best import WITH_DATA, best_policies, reason
from zoo.planning.learned import LEARNED, bundled_folder
from zoo.planning.policies import POLICIES
from zoo.planning.rankings import RANKINGS
from zoo.spec.certificate import Comparison

SEARCHED = "bundled:resnet20-16/macs-cf4"


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return build_model("resnet20-16", 10)


@pytest.fixture(scope="module")
def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(32, 3, 32, 32, generator=generator), torch.arange(32) % 10)


def test_a_searched_profile_is_taken_where_there_is_one(dense: nn.Module) -> None:
    for metric in ("params", "macs"):
        default, searched = (
            zoo.load("resnet20-16", 4, dense, metric=metric, **asked).pruning.plan
            for asked in ({}, {"profile": "searched"})
        )
        assert default == searched


def test_images_put_the_ranking_first(dense: nn.Module, images: TensorDataset) -> None:
    for metric in ("params", "macs"):
        plan = zoo.load("resnet20-16", 4, dense, metric=metric, data=images).pruning.plan
        assert plan.profile == WITH_DATA[metric][0]
        assert plan.got == pytest.approx(4, rel=0.01)


def test_the_learned_policy_is_asked_for_factors_that_it_knows(
    dense: nn.Module, images: TensorDataset
) -> None:
    for cf, name in ((1.5, "global"), (2, "learned"), (6, "learned"), (7, "global")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = zoo.load("resnet20-16", cf, dense, metric="macs", data=images).pruning.plan
        assert plan.profile == name
        assert plan.got == pytest.approx(cf, rel=0.01)


@pytest.mark.parametrize(
    ("leads", "with_images", "without"),
    [
        ({"learned": 0.02, "global-lamp": 0.005, "equal": 0.0}, "learned", SEARCHED),
        ({"learned": 0.005, "global-lamp": 0.02, "equal": 0.03}, "equal", "equal"),
        ({"learned": -0.02, "global-lamp": -0.01, "equal": -0.03}, SEARCHED, SEARCHED),
        ({"learned": 0.03, "global-lamp": 0.035, "cma-es": 0.09}, "learned", "global-lamp"),
        ({"global-lamp": 0.02, "sibling": 0.08}, "learned", "global-lamp"),
    ],
)
def test_what_was_clearly_ahead_on_the_architecture_itself_comes_first(
    dense: nn.Module, images: TensorDataset, leads, with_images, without, monkeypatch, caplog
) -> None:
    compared = tuple(Comparison(name, 2, -lead, 0.01, 0.5, 0.5) for name, lead in leads.items())
    found = zoo.get_profile(SEARCHED)
    assert found.certificate
    certificate = replace(found.certificate, comparisons=compared)
    own = SEARCHED, replace(found, certificate=certificate)
    monkeypatch.setattr("zoo.planning.best.searched_profile", lambda *_: own)
    for data, name in ((images, with_images), (None, without)):
        caplog.clear()
        with caplog.at_level("INFO", "zoo"):
            plan = zoo.load("resnet20-16", 4, dense, metric="macs", data=data).pruning.plan
        assert plan.profile == name
        usual = name == ("learned" if data else SEARCHED)
        assert ("it was ahead of" in caplog.text) != usual
        live = zoo.plan(dense, torch.zeros(1, 3, 32, 32), cf=4, metric="macs", data=data)
        assert live.profile == ("learned" if data else "global-lamp")  # it has no name


def test_limits_rescale_the_searched_profile(dense: nn.Module) -> None:
    asked = {"align": 8, "keep": {"layer1.0.conv1": 1.0}}
    plan = zoo.load("resnet20-16", 4, dense, **asked).pruning.plan
    assert (
        plan
        == zoo.load("resnet20-16", 4, dense, profile="searched", refit=True, **asked).pruning.plan
    )
    assert plan.profile == "bundled:resnet20-16/params-cf4"
    assert plan.keep_ratios["layer1.0.conv1"] == 1
    assert plan.got == pytest.approx(4, rel=0.05)
    with pytest.raises(ZooError, match="applied verbatim"):
        zoo.load("resnet20-16", 4, dense, profile="searched", align=8)


def test_what_nobody_searched_for_is_pruned_by_a_policy(dense: nn.Module) -> None:
    x = torch.zeros(1, 3, 32, 32)
    for metric in ("params", "macs"):
        plan = zoo.load("resnet20-16", 3, dense, metric=metric).pruning.plan
        assert plan.profile == "global-lamp"
        assert plan.got == pytest.approx(3, rel=0.01)
        assert zoo.plan(dense, x, cf=3, metric=metric) == plan


def test_an_untrained_network_has_no_scales_to_rank(dense: nn.Module) -> None:
    with pytest.raises(GraphError, match="score the same by 'bn_scale'"):
        zoo.load("resnet20-16", 3, dense, metric="macs", profile="global-bn")


def test_a_policy_that_does_not_work_gives_way(dense: nn.Module) -> None:
    x, alike = torch.zeros(1, 3, 32, 32), copy.deepcopy(dense)
    for parameter in alike.parameters():
        parameter.data.fill_(0.1)
    with pytest.raises(GraphError, match="score the same by 'l2'"):
        zoo.plan(alike, x, cf=3, metric="macs", profile="global-lamp")
    plan = zoo.plan(alike, x, cf=12, metric="macs")
    assert plan.profile == "equal"
    assert plan.got == pytest.approx(12, rel=0.01)
    with pytest.raises(FactorError, match="cannot be reached"):
        zoo.plan(alike, x, cf=10_000)


def test_best_needs_a_factor_and_searched_stays_strict(dense: nn.Module) -> None:
    with pytest.raises(FactorError, match="'best' needs a compression factor"):
        zoo.load("resnet20-16", weights=dense)
    with pytest.raises(FactorError, match="No searched profile of resnet20-16 at 3x params"):
        zoo.load("resnet20-16", 3, dense, profile="searched")


def test_one_line_says_what_was_taken_and_what_else_there_is(
    dense: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "dense.pt"
    torch.save(dense.state_dict(), checkpoint)
    for cf, name in (("4", "bundled:resnet20-16/params-cf4"), ("3", "'global-lamp'")):
        asked = ["prune", "resnet20-16", "--cf", cf, "--weights", str(checkpoint)]
        assert main([*asked, "--out", str(tmp_path / cf)]) == 0
        (line,) = [own for own in capsys.readouterr().out.splitlines() if own.startswith("best")]
        assert f"best took {name}" in line
        assert WITH_DATA["params"][0] in line
    told = reason("bundled:resnet20-16/params-cf4", "params", 4, data=False)
    assert "measured on 2 networks of resnet20-16 that it did not see" in told
    assert main([*asked, "--profile", "equal", "--out", str(tmp_path / "equal")]) == 0
    assert "best" not in capsys.readouterr().out


def test_the_logger_says_it_once(dense: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "zoo"):
        zoo.load("resnet20-16", 4, dense)
        zoo.prune(dense, torch.zeros(1, 3, 32, 32), cf=3, metric="macs")
        zoo.load("resnet20-16", 4, dense, profile="equal")
    first, second = [record.getMessage() for record in caplog.records if record.name == "zoo"]
    assert first.startswith("best took bundled:resnet20-16/params-cf4")
    assert second.startswith("best took 'global-lamp'")


def test_every_policy_that_it_names_exists() -> None:
    for metric in WITH_DATA:
        for data in (True, False):
            for name in best_policies(metric, 4, data=data):
                assert name in (*POLICIES, *RANKINGS, LEARNED)
                assert reason(name, metric, 4, data=data).count("\n") == 0


@pytest.mark.parametrize("cf", [1.5, 8])
def test_outside_its_factors_learned_is_not_advised_and_the_line_says_why(cf: float) -> None:
    first, *_ = best_policies("macs", cf, data=True)
    assert first == "global"
    assert "with data, 'global' looks" in reason("global-lamp", "macs", cf, data=False)
    assert "'learned' was trained for 2x to 6x alone" in reason(first, "macs", cf, data=True)
    assert "trained for" not in reason("equal", "macs", cf, data=False)


def test_without_data_a_broken_learned_policy_is_nobodys_concern(
    dense: nn.Module, images: TensorDataset, tmp_path: Path, monkeypatch, caplog
) -> None:
    broken = Path(shutil.copytree(bundled_folder(), tmp_path / "policy"))
    (broken / "policy.json").write_text("{}")
    monkeypatch.setattr("zoo.planning.learned.bundled_folder", lambda: broken)
    x = torch.zeros(1, 3, 32, 32)
    with caplog.at_level("INFO", "zoo"):
        zoo.plan(dense, x, cf=3, metric="macs")
    assert "with data, 'global' looks" in caplog.text
    with pytest.raises(DocumentError, match=r"policy\.json"):
        zoo.plan(dense, x, cf=3, metric="macs", data=images)


def test_where_no_policy_works_with_the_data_the_line_says_so(
    dense: nn.Module, images: TensorDataset, caplog
) -> None:
    blind, x = copy.deepcopy(dense), torch.zeros(1, 3, 32, 32)
    nn.init.zeros_(blind.get_submodule("fc").weight)
    with pytest.raises(GraphError, match="no gradient"):
        zoo.plan(blind, x, cf=3, metric="macs", data=images, profile="learned")
    with caplog.at_level("INFO", "zoo"):
        plan = zoo.plan(blind, x, cf=3, metric="macs", data=images)
    assert plan.profile == "global-lamp"
    assert "need data do not work here, as profile='learned' would say" in caplog.text
