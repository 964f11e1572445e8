"""Writing to the Hub: one commit on what was read, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from zoo.errors import ZooError
from zoo.registry import hub_commits
from zoo.registry.hub import HubReference
from zoo.registry.hub_commits import Published, commit_folder, read_head, repositories_with

REPO = "org/repo"
CARD = b"---\nlibrary_name: prunezoo\ntags:\n- pruned\n---\n# Net\n"
FILES = {"README.md": CARD, "config.json": b"{}", "onnx/model.onnx": bytes(range(256)) * 40}


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited between attempts."""
    waits: list[float] = []
    monkeypatch.setattr(hub_commits.time, "sleep", waits.append)
    return waits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "folder", FILES)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def commit(folder: Path, dataset: bool = False, **options) -> Published:
    head = read_head(HubReference(REPO, dataset=dataset))
    return commit_folder(folder, head, "a title", **{"private": True} | options)


def held(hub: LoopbackHub, **options) -> dict[str, bytes]:
    return {name: b for name, b in hub.files(REPO, **options).items() if name != ".gitattributes"}


@pytest.mark.parametrize("dataset", [False, True])
def test_a_folder_becomes_one_commit_of_a_new_private_repository(hub, folder, dataset):
    made = commit(folder, dataset)
    kind = "dataset" if dataset else "model"
    assert held(hub, repo_type=kind) == FILES
    assert hub.repositories[kind, REPO].private
    first, *before = hub.commits(REPO, repo_type=kind)
    assert (first.id, first.title, len(before)) == (made.reference.revision, "a title", 1)
    assert made.sent == {name: len(content) for name, content in FILES.items()}
    assert made.url == f"{hub.endpoint}/{'datasets/' * dataset}{REPO}"
    assert hub.unknown == []


def test_only_what_changed_is_sent_and_what_is_gone_is_deleted(hub, folder):
    commit(folder)
    hub.push(REPO, {"notes.txt": b"somebody's", "onnx/old.onnx": b"ours"})
    write(folder, {"config.json": b'{"a": 1}'})
    made = commit(folder, obsolete=["onnx/old.onnx", "onnx/model.onnx", "never.onnx"])
    assert set(made.sent) == {"config.json"}
    assert made.deleted == ("onnx/old.onnx",)
    assert set(made.unchanged) == {"README.md", "onnx/model.onnx"}
    assert set(held(hub)) == {*FILES, "notes.txt"}
    count = len(hub.commits(REPO))
    assert commit(folder).reference == made.reference
    assert len(hub.commits(REPO)) == count


@pytest.mark.parametrize("exists", [False, True])
def test_a_dry_run_sends_nothing(hub, folder, exists):
    if exists:
        hub.add_repo(REPO, {"config.json": b"{}", "onnx/old.onnx": b"ours"})
    told = commit(folder, dry_run=True, obsolete=["onnx/old.onnx"])
    assert set(told.sent) == set(FILES) - ({"config.json"} if exists else set())
    assert told.deleted == (("onnx/old.onnx",) if exists else ())
    assert told.dry_run
    assert not hub.seen("POST|PUT|DELETE")


def test_what_somebody_else_wrote_meanwhile_is_not_overwritten(hub, folder):
    commit(folder)
    write(folder, {"config.json": b"mine"})

    head = read_head(HubReference(REPO))
    hub.push(REPO, {"config.json": b"theirs"})
    with pytest.raises(ZooError, match="changed by somebody else meanwhile"):
        commit_folder(folder, head, "mine", private=True)
    assert hub.files(REPO)["config.json"] == b"theirs"


def test_a_commit_that_races_another_to_the_server_loses(hub, folder, monkeypatch):
    commit(folder)
    write(folder, {"config.json": b"mine"})
    real, asked = hub_commits._head, []

    def head(reference):
        asked.append(reference)
        found = real(reference)
        if len(asked) == 2:  # after the last look, before the commit
            hub.push(REPO, {"config.json": b"theirs"})
        return found

    monkeypatch.setattr(hub_commits, "_head", head)
    with pytest.raises(ZooError, match="changed by somebody else meanwhile"):
        commit(folder)
    assert hub.files(REPO)["config.json"] == b"theirs"


@pytest.mark.parametrize("kind", ["drop", "drop-after", "status"])
@pytest.mark.parametrize(
    "path",
    ["repos/create", "preupload", "objects/batch", "/objects/[0-9a-f]{64}", "/commit/", "/tree/",
     r"/api/models/org/repo($|\?)"],
)  # fmt: skip
def test_a_publication_goes_on_after_a_fault_anywhere(hub, folder, path, kind):
    hub.fault(kind, path=path)
    made = commit(folder)
    assert held(hub) == FILES
    assert hub.commits(REPO)[0].id == made.reference.revision
    assert len(hub.commits(REPO)) == 2  # the Hub's own first one, and ours


@pytest.mark.parametrize(
    ("path", "status", "hint"),
    [("/commit/", 500, "Cannot publish to the model repository 'org/repo'"),
     ("/commit/", 403, "a token that permits it"), ("preupload", 429, "takes no more requests")],
)  # fmt: skip
def test_a_hub_that_refuses_for_good_is_one_error_and_nothing_is_there(
    hub, folder, path, status, hint
):
    hub.fault("status", path=path, status=status, times=None)
    with pytest.raises(ZooError, match=hint):
        commit(folder)
    assert held(hub) == {}


def test_a_reader_may_not_write(hub, folder, monkeypatch):
    hub.tokens, hub.readers = {"hf_writer"}, {"hf_reader"}
    hub.add_repo(REPO, {"config.json": b"theirs"})
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(ZooError, match="a token that permits it"):
        commit(folder)
    assert held(hub) == {"config.json": b"theirs"}
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    commit(folder)
    assert {r.host for r in hub.requests if r.authorization} == {
        hub.endpoint.removeprefix("http://")
    }


def test_repositories_are_found_by_a_tag_models_and_data_sets(hub):
    hub.add_repo("a/model", tags=["prunezoo"])
    hub.add_repo("b/profiles", tags=["prunezoo"], repo_type="dataset")
    hub.add_repo("c/other", tags=["vision"])
    found = {each.reference: each.tags for each in repositories_with("prunezoo")}
    assert set(found) == {"hf:a/model", "hf:datasets/b/profiles"}
    hub.stop()
    with pytest.raises(ZooError, match="Cannot list the repositories of the Hub"):
        repositories_with("prunezoo")
