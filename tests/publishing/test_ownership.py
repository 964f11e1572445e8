"""What belongs to others: a publication neither overwrites nor deletes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import zoo
from zoo.errors import ZooError
from zoo.registry import hub_commits
from zoo.registry.store import registry_folder


def test_what_somebody_else_adds_meanwhile_is_not_lost(hub, monkeypatch):
    from zoo.publishing import publication

    zoo.publish("bundled:cnet/params-cf4", "org/mine")
    real = publication.write_registry

    def meanwhile(*given: object) -> None:
        hub.push("org/mine", {"cnet/params-cf9.json": b"{}"}, repo_type="dataset")
        real(*given)

    monkeypatch.setattr(publication, "write_registry", meanwhile)
    with pytest.raises(ZooError, match="changed by somebody else meanwhile"):
        zoo.publish("bundled:cnet/params-cf2", "org/mine")
    assert "cnet/params-cf2.json" not in hub.files("org/mine", repo_type="dataset")


def test_somebody_elses_files_of_the_same_names_are_not_overwritten(hub, network_folder):
    theirs = {"index.json": b'{"weight_map": {}}', "README.md": b"# precious"}
    hub.add_repo("org/theirs", theirs, repo_type="dataset")
    hub.add_repo("org/words", {"README.md": b"# precious"})
    hub.add_repo("org/new", {"README.md": b"---\nlicense: mit\n---\n"})
    with pytest.raises(ZooError, match=r"it holds index\.json of another library"):
        zoo.publish("bundled", "org/theirs")
    with pytest.raises(ZooError, match=r"it holds README\.md and no pruning\.json"):
        zoo.publish(network_folder, "org/words")
    assert hub.files("org/theirs", repo_type="dataset").items() >= theirs.items()
    zoo.publish(network_folder, "org/new", options=zoo.PublishOptions(precisions=()))
    assert "pruning.json" in hub.files("org/new")


def test_a_repository_that_somebody_fills_while_it_is_made_is_left_alone(hub, monkeypatch):
    real = hub_commits._created

    def created(reference, private):
        hub.add_repo("org/mine", {"index.json": b"theirs"}, repo_type="dataset")
        return real(reference, private)

    monkeypatch.setattr(hub_commits, "_created", created)
    with pytest.raises(ZooError, match="changed by somebody else meanwhile"):
        zoo.publish("bundled:cnet/params-cf4", "org/mine")
    assert hub.files("org/mine", repo_type="dataset")["index.json"] == b"theirs"


def test_files_that_lie_beside_a_publication_stay(hub, tmp_path):
    zoo.publish("bundled:cnet/params-cf4", "org/mine")
    hub.push("org/mine", {"NOTES.md": b"theirs"}, repo_type="dataset")
    zoo.publish("bundled:cnet/params-cf2", "org/mine")
    made = zoo.publish("bundled", "org/mine")
    assert made.deleted == ()
    assert hub.files("org/mine", repo_type="dataset")["NOTES.md"] == b"theirs"
    assert zoo.verify("hf:datasets/org/mine").ok
    registry = Path(shutil.copytree(registry_folder(), tmp_path / "registry"))
    (registry / "cnet" / "secrets.env").write_text("token")
    assert "cnet/secrets.env" not in zoo.publish(registry, "org/other").sent
    (registry / "cnet" / "params-cf9.json").symlink_to("/etc/passwd")
    with pytest.raises(ZooError, match="is a link"):
        zoo.publish(registry, "org/other")
