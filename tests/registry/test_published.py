"""Published profiles: the authors' counts, on the groups of the networks that they pruned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from timm.models import create_model as timm_model

import zoo
import zoo.registry.published as published
import zoo.registry.store as registry
from zoo.common.documents import decode_document
from zoo.errors import DocumentError, FactorError, GraphError, ZooError
from zoo.registry.store import ProfileEntry, find_profile, write_published_index

PUBLISHED = zoo.list_profiles(source="published")
FOLDER = registry.registry_folder()
every = pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.reference)


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_the_index_is_what_the_documents_make_it(tmp_path: Path) -> None:
    copied = tmp_path / "registry"
    shutil.copytree(FOLDER, copied)
    (copied / "published" / "index.json").unlink()
    write_published_index(copied)
    index = Path("published") / "index.json"
    assert (copied / index).read_text() == (FOLDER / index).read_text()
    assert len(PUBLISHED) == len(list((FOLDER / "published").glob("*.json"))) - 1 >= 10


@every
def test_a_published_profile_names_its_source_and_its_exact_factor(entry: ProfileEntry) -> None:
    profile = zoo.get_profile(entry.reference)
    assert profile.policy == "published"
    assert profile.published is not None
    assert profile.published.source
    assert profile.published.licence in ("Apache-2.0", "MIT")
    assert (profile.architecture, profile.cf, profile.got) == (
        entry.architecture,
        entry.cf,
        entry.got,
    )
    # nothing was measured here
    assert profile.evidence == ()
    assert profile.provenance is None


@pytest.mark.parametrize("reference", ["published:resrep", "published:amc-0.7flops"])
def test_a_published_profile_is_applied_verbatim(reference: str) -> None:
    profile = zoo.get_profile(reference)
    dense = zoo.create_model(profile.architecture, 1000)
    small: Any = zoo.load(profile.architecture, weights=dense.state_dict(), profile=reference)
    for name, kept in profile.kept.items():
        assert len(small.get_submodule(name).weight) == kept
    assert small.pruning.plan.got == pytest.approx(profile.got, rel=1e-12)
    assert small.pruning.plan.profile == reference


@pytest.mark.parametrize("name", ["ecaresnet50d", "efficientnet_b1"])
def test_timms_counts_give_the_shapes_that_timm_builds(name: str) -> None:
    arch, reference = f"timm:{name}", f"published:{name}_pruned"
    dense = zoo.create_model(arch, 1000)
    small = zoo.load(arch, weights=dense.state_dict(), profile=reference)
    assert shapes_of(small) == shapes_of(timm_model(f"{name}_pruned", pretrained=False))


def test_a_published_profile_is_for_its_own_architecture_and_factor() -> None:
    with pytest.raises(FactorError, match="is for torchvision:resnet50, not torchvision:resnet18"):
        zoo.load("torchvision:resnet18", weights="none.pt", profile="published:resrep")
    with pytest.raises(FactorError, match=r"2\.2x macs, not 4x macs.*refit=True"):
        zoo.load(
            "torchvision:resnet50",
            cf=4,
            metric="macs",
            weights="none.pt",
            profile="published:resrep",
        )
    with pytest.raises(ZooError, match=r"Did you mean 'published:resrep'"):
        zoo.get_profile("published:resrap")


def test_another_file_of_timm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.loads((FOLDER / "published" / "ecaresnet50d_pruned.json").read_text())
    original = decode_document(published.TimmCounts, raw, "").path
    other = tmp_path / original.name
    other.write_text(original.read_text().replace("[64]", "[63]", 1))
    monkeypatch.setattr(published.TimmCounts, "path", other)
    with pytest.raises(ZooError, match="is not the one that was published"):
        zoo.get_profile("published:ecaresnet50d_pruned")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"kept": {"conv1": 1}}, "is not in both"),
        ({"policy": 3}, "policy"),
        ({"published": {"source": "x"}}, "licence"),
    ],
)
def test_a_damaged_document_is_refused(
    tmp_path: Path, damage: dict[str, Any], message: str
) -> None:
    document = json.loads((FOLDER / "published" / "resrep.json").read_text()) | damage
    (tmp_path / "resrep.json").write_text(json.dumps(document))
    groups = registry.stored_groups("torchvision:resnet50")
    assert groups is not None
    with pytest.raises(DocumentError, match=message):
        published.read_published(tmp_path / "resrep.json", groups)


def test_counts_that_the_groups_cannot_have_are_refused() -> None:
    profile = zoo.get_profile("published:resrep")
    groups = registry.stored_groups(profile.architecture)
    assert groups is not None
    assert profile.published is not None
    for kept in ({**profile.kept, "conv1": 65}, {**profile.kept, "conv1": 0}):
        with pytest.raises(DocumentError, match="'conv1' keeps"):
            published.profile_of(
                profile.architecture, kept, groups, profile.reference, profile.published
            )


def test_a_network_of_the_same_names_and_other_sizes_is_refused() -> None:
    wide = torchvision.models.wide_resnet50_2()
    with pytest.raises(
        GraphError, match=r"is for torchvision:resnet50, whose 'layer1\.0\.conv1' has"
    ):
        zoo.plan(wide, torch.zeros(1, 3, 64, 64), profile="published:resrep")


def test_a_metric_that_is_not_the_profiles_is_not_ignored() -> None:
    with pytest.raises(FactorError, match=r"is for 2\.2x macs, not 2\.2x latency"):
        zoo.load(
            "torchvision:resnet50", weights="none.pt", profile="published:resrep", metric="latency"
        )


def test_a_changed_document_is_not_the_one_that_the_index_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(FOLDER, folder)
    path = folder / "published" / "resrep.json"
    path.write_text(path.read_text().replace("MIT", "CC0"))
    monkeypatch.setattr(registry, "registry_folder", lambda: folder)
    with pytest.raises(DocumentError, match="is not the file that the registry's index lists"):
        zoo.get_profile("published:resrep")


def test_what_others_published_is_found_by_the_architecture_with_or_without_a_tag() -> None:
    for arch in ("timm:efficientnet_b1", "timm:efficientnet_b1.ft_in1k"):
        (entry,) = zoo.list_profiles(arch=arch, source="published")
        assert entry.reference == "published:efficientnet_b1_pruned"
        with pytest.raises(FactorError, match=f"Published by others: {entry.reference}"):
            find_profile(arch, 4)
    with pytest.raises(ZooError, match="Unknown published profile"):
        zoo.get_profile("published:")
