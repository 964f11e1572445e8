"""The bundled profiles hold what the index and they themselves say; references find profiles."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub

import zoo
import zoo.registry.store as registry
from zoo.errors import DocumentError, FactorError, ZooError
from zoo.models import ARCHITECTURES, parameter_count
from zoo.planning.solver import round_widths
from zoo.registry.store import ProfileEntry, find_profile, stored_groups, write_index
from zoo.spec.cost import cost_model
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import SIBLING, Profile, Reference

BUNDLED = zoo.list_profiles()
FOLDER = registry.registry_folder()

every_bundled = pytest.mark.parametrize("entry", BUNDLED, ids=lambda entry: entry.reference)


def groups_of(entry: ProfileEntry) -> ChannelGroups:
    groups = stored_groups(entry.architecture)
    assert groups is not None
    return groups


def path_of(entry: ProfileEntry) -> Path:
    name = entry.reference.removeprefix(f"bundled:{entry.architecture}/")
    return FOLDER / entry.architecture.replace(":", "--") / f"{name}.json"


# --- the bundled profiles -------------------------------------------------------------------------


def test_there_are_bundled_profiles() -> None:
    assert BUNDLED


def test_the_index_is_what_the_files_make_it(tmp_path: Path) -> None:
    copied = tmp_path / "registry"
    shutil.copytree(FOLDER, copied)
    (copied / "index.json").unlink()
    write_index(copied)
    assert (copied / "index.json").read_text() == (FOLDER / "index.json").read_text()
    found = {path for path in FOLDER.glob("*/*-cf*.json") if path.parent.name != "published"}
    assert {path_of(entry) for entry in BUNDLED} == found
    keys = [(entry.architecture, entry.metric, entry.cf) for entry in BUNDLED]
    assert len(set(keys)) == len(keys)


@every_bundled
def test_an_entry_agrees_with_its_file(entry: ProfileEntry) -> None:
    profile = zoo.get_profile(entry.reference)
    assert hashlib.sha256(path_of(entry).read_bytes()).hexdigest() == entry.sha256
    for field in ("architecture", "metric", "cf", "got"):
        assert getattr(profile, field) == getattr(entry, field)
    assert entry.reference == f"bundled:{profile.architecture}/{profile.name}"
    assert find_profile(profile.architecture, profile.cf, profile.metric) == (
        entry.reference,
        profile,
    )
    assert profile.policy == "searched"


@every_bundled
def test_the_factor_is_that_of_the_kept_counts_at_the_reference(entry: ProfileEntry) -> None:
    profile, groups = zoo.get_profile(entry.reference), groups_of(entry)
    known = ARCHITECTURES[profile.architecture]
    assert profile.reference == Reference(known.num_classes, known.image_size)
    assert groups.image_size == known.image_size
    assert tuple(profile.kept) == groups.names
    assert tuple(profile.keep_ratios) == groups.names
    widths = [profile.kept[name] for name in groups.names]
    assert all(1 <= width <= size for width, size in zip(widths, groups.sizes, strict=True))
    ratios = [profile.keep_ratios[name] for name in groups.names]
    assert round_widths(groups.sizes, ratios) == tuple(widths)
    assert profile.got == cost_model(groups).factor(widths, profile.metric)
    assert profile.got == pytest.approx(profile.cf, rel=0.02)


@every_bundled
def test_a_loaded_network_has_the_parameters_that_the_profile_states(entry: ProfileEntry) -> None:
    profile = zoo.get_profile(entry.reference)
    dense = zoo.create_model(entry.architecture, profile.reference.num_classes)
    model = zoo.load(entry.architecture, entry.cf, dense, metric=entry.metric, profile="searched")
    sizes = [parameter_count(module) for module in (dense, model)]
    plan = model.pruning.plan
    assert plan.profile == entry.reference
    assert plan.widths == profile.kept
    assert plan.got == profile.got
    if profile.metric == "params":
        assert sizes[0] / sizes[1] == profile.got


@every_bundled
def test_provenance_is_complete(entry: ProfileEntry) -> None:
    provenance = zoo.get_profile(entry.reference).provenance
    assert provenance is not None
    for field in ("command", "agent", "split_digest", "fidelity", "machine", "date"):
        assert getattr(provenance, field).strip(), field
    assert entry.architecture in provenance.command
    assert provenance.tasks
    assert provenance.episodes > 0
    assert provenance.evaluations > 0
    assert provenance.seconds > 0
    assert "torch" in provenance.versions


@every_bundled
def test_evidence_sets_the_profile_beside_its_rivals(entry: ProfileEntry) -> None:
    profile, groups = zoo.get_profile(entry.reference), groups_of(entry)
    model = cost_model(groups)
    measured = 0
    for exam in {row.exam for row in profile.evidence}:
        own = [row for row in profile.evidence if row.exam == exam]
        rows = {row.policy: row for row in own}
        assert len(rows) == len(own)
        assert {"base", "searched", "equal"} <= rows.keys()
        assert {"greedy", SIBLING} & rows.keys()
        kept = model([profile.kept[name] for name in groups.names])
        assert (rows["searched"].params, rows["searched"].macs) == (kept.params, kept.macs)
        assert (rows["base"].params, rows["base"].macs) == (model.dense.params, model.dense.macs)
        for row in own:
            if row.policy != "base":
                got = getattr(model.dense, profile.metric) / getattr(row, profile.metric)
                assert got == pytest.approx(profile.cf, rel=0.02), row.policy
        tuned = [row for row in own if row.policy not in ("base", SIBLING) and not row.standard]
        longer = [row for row in own if row.standard]
        for rivals in (tuned, longer):  # the same training and seeds, or it is no comparison
            assert len({(row.fidelity, row.seeds) for row in rivals}) <= 1
            for row in rivals:
                assert len(row.before) == len(row.seeds)
        for row in tuned:
            assert row.sd == pytest.approx(statistics.stdev(row.accuracies), abs=1e-6)
        assert all("teacher" in row.fidelity for row in longer)
        measured += len(rows["searched"].seeds)
    assert measured >= 3
    for row in profile.evidence:
        assert row.mean == pytest.approx(statistics.mean(row.accuracies), abs=1e-6)
        assert len(row.seeds) == len(row.accuracies) == len(set(row.seeds))
        assert all(0 <= accuracy <= 1 for accuracy in (*row.accuracies, *row.before))
        assert row.fidelity.strip()
        assert row.data.strip()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_registered_architecture_has_its_groups(arch: str) -> None:
    groups = stored_groups(arch)
    assert groups is not None
    assert groups.image_size == ARCHITECTURES[arch].image_size
    assert not groups.unprunable


# --- references -----------------------------------------------------------------------------------


def a_profile(cf: float = 4.0, metric: str = "params", arch: str = "resnet20-16") -> Profile:
    return Profile(arch, metric, cf, cf, Reference(10, 32), {"conv1": 0.5}, {"conv1": 8})


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of four profiles of two architectures, in place of the bundled one."""
    folder = tmp_path / "registry"
    for profile in (
        a_profile(10.0),
        a_profile(2.5),
        a_profile(4.0, "macs"),
        a_profile(4.0, arch="timm:resnet18"),
    ):
        name = profile.architecture.replace(":", "--")
        profile.write(folder / name / f"{profile.name}.json")
    write_index(folder)
    monkeypatch.setattr(registry, "registry_folder", lambda: folder)
    return folder


def test_profiles_are_listed_by_architecture_metric_and_factor(own: Path) -> None:
    assert [entry.reference for entry in zoo.list_profiles()] == [
        "bundled:resnet20-16/macs-cf4",
        "bundled:resnet20-16/params-cf2.5",
        "bundled:resnet20-16/params-cf10",
        "bundled:timm:resnet18/params-cf4",
    ]
    assert [entry.cf for entry in zoo.list_profiles(arch="resnet20-16", metric="params")] == [
        2.5,
        10,
    ]
    assert zoo.list_profiles(arch="timm:resnet18", metric="macs") == []
    for known in ("cnet", "torchvision:resnet18", "timm:resnet34"):
        assert zoo.list_profiles(arch=known) == []
    assert (own / "timm--resnet18").is_dir()


@pytest.mark.usefixtures("own")
def test_every_listed_reference_can_be_fetched() -> None:
    for entry in zoo.list_profiles():
        profile = zoo.get_profile(entry.reference)
        assert (profile.architecture, profile.cf) == (entry.architecture, entry.cf)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet20_16"}, r"'resnet20_16'\. Did you mean 'resnet20-16'\?"),
        ({"arch": "vgg"}, r"Unknown architecture 'vgg'\. Known: .*resnet20-16"),
        ({"arch": "timm:resnet81"}, r"timm architecture 'resnet81'\. Did you mean 'timm:resnet"),
        ({"arch": "resnet18"}, "write 'torchvision:resnet18' or 'timm:resnet18'"),
        ({"metric": "parms"}, r"metric 'parms'\. Did you mean 'params'\?"),
        ({"metric": "flops"}, r"metric 'flops'\..*params, macs, latency"),
        ({"source": "bundeld"}, r"source 'bundeld'\. Did you mean 'bundled'\?"),
        ({"source": "hf:nobody"}, "not a Hub reference"),
    ],
)
def test_a_list_of_what_there_is_not_says_what_there_is(options: dict, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        zoo.list_profiles(**options)


@pytest.mark.usefixtures("own")
def test_a_factor_that_no_profile_has_names_those_there_are() -> None:
    assert find_profile("resnet20-16", 10)[0] == "bundled:resnet20-16/params-cf10"
    with pytest.raises(FactorError, match=r"at 4x params: it has 4x macs, 2\.5x params, 10x par"):
        find_profile("resnet20-16", 4)
    with pytest.raises(FactorError, match=r"cnet has none\. profile='best'.*any factor"):
        find_profile("cnet", 4)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("resnet20-16/params-cf10", r"names no source.*'file:resnet20-16/params-cf10'"),
        ("p.json", r"names no source: write 'bundled:.*'file:p\.json' or 'hf:"),
        ("bundle:resnet20-16/params-cf10", "names no source"),
        ("bundled:", "names no source"),
        ("", "names no source"),
        ("bundled:resnet20-16", r"Expected bundled:<architecture>/<metric>-cf<k>"),
        ("bundled:resnet20-16/params-cf9", r"Did you mean 'bundled:resnet20-16/params-cf"),
        ("bundled:resnet20-16/../../secret", "Expected bundled:"),
        ("bundled:/resnet20-16/params-cf10", "Expected bundled:"),
        ("bundled:resnet20-16\\params-cf10", "Expected bundled:"),
        ("bundled:timm--resnet18/params-cf4", r"Did you mean 'bundled:timm:resnet18/params-cf4'"),
        ("file:/nowhere/p.json", "/nowhere/p.json does not exist"),
        ("hf:nobody", "not a Hub reference"),
    ],
)
def test_a_reference_that_leads_nowhere_says_so(reference: str, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        zoo.get_profile(reference)


def test_only_what_the_index_names_is_a_bundled_profile(own: Path) -> None:
    for path in (own.parent / "secret.json", own / "resnet20-16" / "params-cf8.json"):
        a_profile(8.0).write(path)
    for reference in (f"bundled:{own.parent}/secret", f"bundled:\\{own.parent}\\secret"):
        with pytest.raises(ZooError, match="Expected bundled:<architecture>/<metric>-cf<k>"):
            zoo.get_profile(reference)
    for name in ("groups", "params-cf8"):
        message = rf"Unknown profile 'bundled:resnet20-16/{name}'.*bundled:resnet20-16/params-cf10"
        with pytest.raises(ZooError, match=message):
            zoo.get_profile(f"bundled:resnet20-16/{name}")


def test_file_references_know_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_profile().write(tmp_path / "p.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zoo.get_profile("file:~/p.json") == a_profile()
    (tmp_path / "half.json").write_text((tmp_path / "p.json").read_text()[:100])
    with pytest.raises(DocumentError, match=r"half\.json is not valid JSON"):
        zoo.get_profile("file:~/half.json")


def test_a_broken_index_is_refused(own: Path) -> None:
    body = json.loads((own / "index.json").read_text())
    for change, message in (
        ({"schema_version": 99}, "schema_version is 99"),
        ({"profile": []}, r"'profile'\. Did you mean 'profiles'\?"),
        ({"profiles": [{"reference": 3}]}, "expected a string, got 3"),
    ):
        (own / "index.json").write_text(json.dumps(body | change))
        with pytest.raises(DocumentError, match=message):
            zoo.list_profiles()


AT_HUB = "hf:datasets/someone/profiles"


@pytest.fixture
def at_hub(hub: LoopbackHub) -> str:
    """The bundled registry as the data set `AT_HUB`; the id of its commit."""
    files = {p.relative_to(FOLDER).as_posix(): p.read_bytes() for p in FOLDER.rglob("*.json")}
    return hub.add_repo("someone/profiles", files, repo_type="dataset")


def test_the_profiles_of_a_hub_repository_are_listed_and_fetched_at_one_commit(
    hub: LoopbackHub, at_hub: str
) -> None:
    entries = zoo.list_profiles(source=AT_HUB)
    hub.push("someone/profiles", {"cnet/params-cf2.json": b"{}"}, repo_type="dataset")
    assert [e.reference for e in entries] == [
        f"{AT_HUB}/{e.reference.removeprefix('bundled:')}.json@{at_hub}" for e in BUNDLED
    ]
    for entry, bundled in zip(entries, BUNDLED, strict=True):
        assert zoo.get_profile(entry.reference) == zoo.get_profile(bundled.reference)
    with pytest.raises(ZooError, match=rf"Unknown profile '{AT_HUB}'.*cnet/params-cf4\.json"):
        zoo.get_profile(AT_HUB)


def test_a_hub_repository_gives_the_profile_of_the_network_at_hand(
    hub: LoopbackHub, at_hub: str
) -> None:
    network = zoo.create_model("resnet20-16", 10)
    pruned: Any = zoo.load("resnet20-16", 4, network, profile=AT_HUB, metric="macs")
    reference = f"{AT_HUB}/resnet20-16/macs-cf4.json@{at_hub}"
    assert pruned.pruning.plan.profile == reference
    fetched = {request.path.rpartition("/")[2] for request in hub.seen("GET", "resolve")}
    assert fetched == {"index.json", "macs-cf4.json"}
    alone: Any = zoo.load("resnet20-16", None, network, profile=reference.partition("@")[0])
    assert alone.pruning.plan == pruned.pruning.plan
    with pytest.raises(FactorError, match=r"has no profile of resnet20-16 at 3x params: it has"):
        zoo.load("resnet20-16", 3, network, profile=AT_HUB)
    with pytest.raises(FactorError, match="has several profiles: pass cf="):
        zoo.load("resnet20-16", None, network, profile=AT_HUB)


def test_a_bundled_profile_that_was_changed_is_refused(own: Path) -> None:
    path = own / "resnet20-16" / "params-cf10.json"
    path.write_text(path.read_text().replace("10.0", "10.00", 1))
    with pytest.raises(DocumentError, match="not the file that the registry's index lists"):
        zoo.get_profile("bundled:resnet20-16/params-cf10")
    assert zoo.get_profile("bundled:resnet20-16/params-cf2.5").cf == 2.5
