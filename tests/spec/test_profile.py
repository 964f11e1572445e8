from __future__ import annotations

import dataclasses

import pytest

from zoo.errors import DocumentError
from zoo.spec.profile import Evidence, Profile, Provenance, Reference


def make_profile(**changes) -> Profile:
    values = {
        "architecture": "resnet20-16",
        "metric": "params",
        "cf": 4.0,
        "got": 4.01,
        "reference": Reference(10, 32),
        "keep_ratios": {"conv1": 1.0, "layer1.0.conv1": 0.3125},
        "kept": {"conv1": 16, "layer1.0.conv1": 5},
        "provenance": Provenance(
            "zoo search", "ppo", 0, 10, 10, 1.5, ("cifar10/0",), "ab", "bn", "2 cores", "today",
            {"torch": "2.15"},
        ),
        "evidence": (Evidence("equal", 10, 20, 0.5, 0.1, (0, 1), (0.4, 0.6), "1 epoch", "val"),),
    }  # fmt: skip
    return Profile(**(values | changes))


def test_a_profile_survives_a_round_trip_through_its_file(tmp_path):
    profile = make_profile()
    profile.write(tmp_path / "p.json")
    assert Profile.read(tmp_path / "p.json") == profile


def test_the_name_is_the_metric_and_the_factor():
    assert make_profile().name == "params-cf4"
    assert make_profile(metric="macs", cf=2.5).name == "macs-cf2.5"


def test_a_typod_key_names_the_nearest_one_and_the_document():
    raw = make_profile().to_json()
    raw["keep_ratio"] = raw.pop("keep_ratios")
    with pytest.raises(DocumentError, match=r"here: unknown key 'keep_ratio'.*'keep_ratios'"):
        Profile.from_json(raw, "here")
    raw = make_profile().to_json()
    raw["evidence"][0]["polcy"] = "x"
    with pytest.raises(DocumentError, match=r"evidence\[0\]: unknown key 'polcy'.*'policy'"):
        Profile.from_json(raw)


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_schema_version_is_refused(version):
    raw = make_profile().to_json() | {"schema_version": version}
    with pytest.raises(DocumentError, match="schema_version"):
        Profile.from_json(raw)


def test_a_missing_schema_version_is_refused():
    raw = make_profile().to_json()
    del raw["schema_version"]
    with pytest.raises(DocumentError, match="schema_version is None"):
        Profile.from_json(raw)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_a_keep_ratio_outside_zero_to_one_is_refused(ratio):
    with pytest.raises(DocumentError, match=r"β of 'conv1'.*\(0, 1\]"):
        make_profile(keep_ratios={"conv1": ratio, "layer1.0.conv1": 0.5})


def test_kept_and_keep_ratios_must_name_the_same_groups():
    with pytest.raises(DocumentError, match=r"'layer1.0.conv1' is not in both"):
        make_profile(kept={"conv1": 16})
    with pytest.raises(DocumentError, match="keeps 0 channels"):
        make_profile(kept={"conv1": 0, "layer1.0.conv1": 5})


@pytest.mark.parametrize("cf", [0.5, 0.0, -4.0, float("nan")])
def test_a_factor_below_one_is_refused(cf):
    with pytest.raises(DocumentError, match="at least 1"):
        make_profile(cf=cf)


def test_an_unknown_metric_names_the_nearest_one():
    with pytest.raises(DocumentError, match=r"metric 'parms'. Did you mean 'params'\?"):
        make_profile(metric="parms")


def test_profiles_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_profile().cf = 2.0
