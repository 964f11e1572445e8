"""The loopback Hub that other tests rely on: the real client finds in it what the Hub would say."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

# The client's own client: httpx, or its successor.
httpx = importlib.import_module(type(huggingface_hub.get_session()).__module__.partition(".")[0])

CARD = b"---\nlibrary_name: prunezoo\ntags:\n- pruned\nlicense: mit\n---\n# Net\n"
WEIGHTS = bytes(range(256)) * 40
REPO = "zoo/net"

# The client's own, on uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def _nothing_unknown(hub):
    yield
    assert hub.unknown == []
    stored = [r for r in hub.requests if f"http://{r.host}" == hub.storage]
    assert {r.authorization for r in stored} <= {None}


def add(**files: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name.replace("_", "."), content) for name, content in files.items()]


def publish(parent: str | None = None, repo_type: str = "model", **files: bytes):
    return HfApi().create_commit(
        REPO, add(**files), commit_message="add", parent_commit=parent, repo_type=repo_type
    )


def download(name: str = "model.safetensors", **options) -> Path:
    return Path(huggingface_hub.hf_hub_download(REPO, name, **options))


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_round_trip_of_a_small_and_a_large_file(hub, tmp_path, repo_type):
    large = tmp_path / "weights"
    large.write_bytes(WEIGHTS)
    assert HfApi().create_repo(REPO, repo_type=repo_type).repo_id == REPO
    assert HfApi().create_repo(REPO, repo_type=repo_type, exist_ok=True).repo_type == repo_type
    operations = [*add(README_md=CARD), CommitOperationAdd("deep/w.npy", str(large))]
    made = HfApi().create_commit(REPO, operations, commit_message="one", repo_type=repo_type)
    assert hub.commits(REPO, repo_type=repo_type)[0].id == made.oid
    assert hub.files(REPO, repo_type=repo_type).items() >= {"deep/w.npy": WEIGHTS}.items()
    assert hub.objects == {hashlib.sha256(WEIGHTS).hexdigest(): WEIGHTS}
    assert len(hub.seen("PUT", "/objects/")) == 1
    for name, content in (("README.md", CARD), ("deep/w.npy", WEIGHTS)):
        path = download(name, repo_type=repo_type)
        assert path.read_bytes() == content
        assert path.parts[-len(Path(name).parts) - 2 :][:2] == ("snapshots", made.oid)
        assert path.is_relative_to(hub.home)


def test_what_the_api_tells_of_a_repository(hub):
    first = hub.add_repo(REPO, {"README.md": CARD})
    second = publish(model_safetensors=WEIGHTS, config_json=b"{}").oid
    HfApi().create_tag(REPO, tag="v1", revision=first)
    info = HfApi().model_info(REPO, files_metadata=True)
    assert info.sha == second
    assert set(info.tags) == {"pruned", "prunezoo", "license:mit"}
    assert info.card_data.license == "mit"
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes == {name: len(content) for name, content in hub.files(REPO).items()}
    assert HfApi().repo_info(REPO, revision="v1").sha == first
    assert HfApi().list_repo_files(REPO, revision=first) == [".gitattributes", "README.md"]
    hub.page_size = 2
    tree = {entry.path: entry for entry in HfApi().list_repo_tree(REPO, recursive=True)}
    assert list(tree) == list(hub.files(REPO))
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    (config,) = HfApi().get_paths_info(REPO, ["config.json", "absent"])
    assert (config.size, config.lfs) == (2, None)
    assert [commit.commit_id for commit in HfApi().list_repo_commits(REPO)] == [
        commit.id for commit in hub.commits(REPO)
    ]


def test_folders_are_listed_deleted_and_downloaded_by_pattern(hub):
    head = hub.add_repo(REPO, {"a/x.json": b"1", "a/b/y.json": b"2", "c/z.txt": b"3"})
    assert {entry.path for entry in HfApi().list_repo_tree(REPO, "a")} == {"a/x.json", "a/b"}
    folder = Path(huggingface_hub.snapshot_download(REPO, allow_patterns=["a/*"]))
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert (folder.name, found) == (head, {"a/x.json", "a/b/y.json"})
    HfApi().create_commit(REPO, [CommitOperationDelete("a/")], commit_message="less")
    assert set(hub.files(REPO)) == {".gitattributes", "c/z.txt"}
    assert hub.files(REPO, head)["a/b/y.json"] == b"2"
    HfApi().delete_repo(REPO)
    with pytest.raises(errors.RepositoryNotFoundError):
        HfApi().repo_info(REPO)


def test_models_are_found_by_tag_page_by_page(hub):
    for number in range(5):
        hub.add_repo(f"zoo/n{number}", {"README.md": CARD})
    hub.add_repo("zoo/other", tags=["else"])
    hub.add_repo("zoo/data", repo_type="dataset", tags=["pruned"])
    hub.page_size = 2
    found = list(HfApi().list_models(filter="pruned"))
    assert [model.id for model in found] == [f"zoo/n{number}" for number in range(5)]
    assert found[0].sha is None
    (full,) = HfApi().list_models(filter=["else"], full=True)
    assert full.sha == hub.commits("zoo/other")[0].id
    assert [data.id for data in HfApi().list_datasets(filter="pruned")] == ["zoo/data"]


def test_a_stale_parent_is_refused(hub):
    parent = hub.add_repo(REPO)
    hub.push(REPO, {"config.json": b"{}"})
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since") as caught:
        publish(parent, a_txt=b"1")
    assert caught.value.response.status_code == 412
    assert "a.txt" not in hub.files(REPO)
    publish(hub.commits(REPO)[0].id, a_txt=b"1")
    assert hub.files(REPO)["a.txt"] == b"1"


def test_unchanged_files_make_no_commit_unless_sent(hub):
    parent = hub.add_repo(REPO)
    head = publish(a_txt=b"1", model_safetensors=WEIGHTS).oid
    assert publish(parent, a_txt=b"1", model_safetensors=WEIGHTS).oid == head
    assert len(hub.seen("POST", "/commit/")) == 1
    body = hub.seen("POST", "/commit/")[0].body
    answer = httpx.post(f"{hub.endpoint}/api/models/{REPO}/commit/main", content=body)
    assert hub.commits(REPO)[0].id == answer.json()["commitOid"] != head
    assert hub.files(REPO) == hub.files(REPO, head)


def test_a_token_opens_what_is_private_and_stays_at_the_endpoint(hub):
    hub.tokens, hub.readers = {"hf_w"}, {"hf_r"}
    hub.add_repo(REPO, {"model.safetensors": WEIGHTS}, private=True)
    with pytest.raises(errors.RepositoryNotFoundError):
        download(token=False)
    with pytest.raises(errors.HfHubHTTPError, match="Invalid credentials"):
        download(token="hf_x")
    path = download(token="hf_r")
    assert path.read_bytes() == WEIGHTS
    with pytest.raises(errors.HfHubHTTPError) as caught:
        HfApi(token="hf_r").create_commit(REPO, add(a_txt=b"1"), commit_message="no")
    assert caught.value.response.status_code == 403
    HfApi(token="hf_w").create_commit(REPO, add(b_npy=b"\0" * 9), commit_message="yes")
    assert HfApi().whoami(token="hf_w")["name"] == "tester"
    assert {r.authorization for r in hub.seen("PUT|GET", "/objects/")} == {None}
    assert "Bearer hf_w" in {r.authorization for r in hub.seen("POST", "/commit/")}
    assert list(HfApi().list_models()) == []


def test_refusals_carry_the_hubs_codes(hub):
    hub.add_repo(REPO, {"a.txt": b"1"})
    hub.add_repo("zoo/gated", {"a.txt": b"1"}, gated=True)
    with pytest.raises(errors.GatedRepoError):
        huggingface_hub.hf_hub_download("zoo/gated", "a.txt")
    with pytest.raises(errors.RevisionNotFoundError):
        download("a.txt", revision="v9")
    with pytest.raises(errors.RemoteEntryNotFoundError):
        download("b.txt")
    with pytest.raises(errors.RepositoryNotFoundError):
        huggingface_hub.hf_hub_download("zoo/none", "a.txt")


def test_the_cache_serves_offline_and_when_the_hub_is_gone(hub, monkeypatch):
    hub.add_repo(REPO, {"a.txt": b"1"})
    path = download("a.txt")
    count = len(hub.requests)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert download("a.txt") == path
        with pytest.raises(errors.LocalEntryNotFoundError):
            download("b.txt")
        with pytest.raises(errors.OfflineModeIsEnabled):
            HfApi().list_repo_files(REPO)
    assert len(hub.requests) == count
    hub.stop()
    assert download("a.txt") == path
    with pytest.raises(errors.LocalEntryNotFoundError):
        download("b.txt")


def test_a_subprocess_finds_the_hub_by_its_environment(hub):
    hub.add_repo(REPO, {"model.safetensors": WEIGHTS})
    code = f"import huggingface_hub as h; print(h.hf_hub_download({REPO!r}, 'model.safetensors'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).read_bytes() == WEIGHTS
    assert Path(done.stdout.strip()).is_relative_to(hub.home)


@pytest.mark.parametrize("kind", ["drop", "truncate"])
def test_a_broken_download_is_taken_up_again(hub, kind):
    hub.add_repo(REPO, {"model.safetensors": WEIGHTS})
    hub.fault(kind, method="GET", path="/objects/", times=2)
    assert download().read_bytes() == WEIGHTS
    assert len(hub.seen("GET", "/objects/")) == 3
    assert hub.sleeps == [1, 1]


def test_a_download_that_stays_broken_fails_and_leaves_nothing(hub):
    hub.add_repo(REPO, {"model.safetensors": WEIGHTS})
    hub.fault("truncate", path="/objects/", times=None)
    with pytest.raises(httpx.RemoteProtocolError):
        download()
    assert len(hub.seen("GET", "/objects/")) == 6
    assert not list(hub.home.rglob("*.safetensors"))
    hub.heal()
    assert download().read_bytes() == WEIGHTS


def test_a_corrupt_download_is_not_noticed(hub):
    hub.add_repo(REPO, {"model.safetensors": WEIGHTS})
    hub.fault("corrupt", method="GET", path="/objects/")
    path = download()
    assert path.read_bytes() != WEIGHTS
    assert path.resolve().name == hashlib.sha256(WEIGHTS).hexdigest()
    assert download() == path


def test_a_wrong_etag_names_the_blob_in_the_cache(hub):
    hub.add_repo(REPO, {"model.safetensors": WEIGHTS})
    hub.fault("etag", path="/resolve/")
    assert download().resolve().name == "0" * 64


@pytest.mark.parametrize(
    ("status", "attempts"), [(429, 3), (500, 3), (503, 3), (501, 1)], ids=lambda value: str(value)
)
def test_a_status_in_answer_to_head(hub, status, attempts):
    hub.add_repo(REPO, {"a.txt": b"1"})
    hub.fault("status", status=status, times=2, headers={"Retry-After": "0"}, path="/resolve/")
    if attempts == 1:
        with pytest.raises(errors.LocalEntryNotFoundError):
            download("a.txt")
    else:
        assert download("a.txt").read_bytes() == b"1"
    assert len(hub.seen("HEAD")) == attempts
    assert all(seconds <= 1 for seconds in hub.sleeps)


def test_a_dropped_head_is_an_error_even_of_what_is_cached(hub):
    hub.add_repo(REPO, {"a.txt": b"1"})
    download("a.txt")
    hub.fault("drop", method="HEAD")
    with pytest.raises(httpx.RemoteProtocolError):
        download("a.txt")


def test_a_delayed_head_is_asked_for_again(hub):
    hub.add_repo(REPO, {"a.txt": b"1"})
    hub.fault("delay", seconds=30, method="HEAD")
    start = time.monotonic()
    assert download("a.txt", etag_timeout=0.2).read_bytes() == b"1"
    assert 0.2 < time.monotonic() - start < 10
    assert len(hub.seen("HEAD")) == 2


def test_a_redirect_to_another_host_gets_no_token(hub):
    hub.add_repo(REPO, {"a.txt": b"1"})
    hub.fault("redirect", method="GET", path="/api/models/", times=None)
    assert HfApi(token="hf_secret").list_repo_files(REPO) == [".gitattributes", "a.txt"]
    here, there = hub.seen("GET", "/api/models/")
    assert (here.authorization, there.authorization) == ("Bearer hf_secret", None)
    assert (here.host, there.host) == (hub.endpoint[7:], hub.elsewhere[7:])


def test_the_answer_to_a_commit_can_be_lost(hub):
    parent = hub.add_repo(REPO)
    hub.fault("drop-after", method="POST", path="/commit/")
    with pytest.raises(httpx.RemoteProtocolError):
        publish(parent, a_txt=b"1")
    made = hub.commits(REPO)[0].id
    assert hub.files(REPO)["a.txt"] == b"1"
    assert publish(parent, a_txt=b"1").oid == made
    assert len(hub.seen("POST", "/commit/")) == 1


def test_uploads_are_repeated_but_never_a_commit(hub):
    hub.add_repo(REPO)
    hub.fault("drop-after", method="PUT")
    hub.fault("status", method="PUT", status=500)
    hub.fault("status", method="POST", path="/preupload/")
    publish(model_safetensors=WEIGHTS)
    assert len(hub.seen("PUT")) == 3
    hub.fault("status", method="POST", path="/commit/")
    with pytest.raises(errors.HfHubHTTPError, match="503"):
        publish(a_txt=b"1")
    assert "a.txt" not in hub.files(REPO)
