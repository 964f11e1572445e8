"""Reading from the Hub: references, the real client against a real server, and all that fails."""

from __future__ import annotations

import subprocess
import sys

import huggingface_hub
import pytest
from loopback_hub import LoopbackHub

from zoo.errors import ZooError
from zoo.registry.hub import HubReference, download, files_of

SMALL, LARGE = b'{"small": true}', bytes(range(256)) * 60_000


@pytest.fixture
def files(hub: LoopbackHub) -> dict[str, bytes]:
    """What the repository org/repo holds: a small file, and one that the Hub stores elsewhere."""
    files = {"a.json": SMALL, "deep/model.safetensors": LARGE}
    hub.add_repo("org/repo", files)
    return files


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/repo", ("org/repo", None, None, False)),
        ("hf:org/repo@v1.0", ("org/repo", None, "v1.0", False)),
        ("org/a.b-c_d/model.safetensors", ("org/a.b-c_d", "model.safetensors", None, False)),
        ("hf:org/repo/deep/er/m.pt@abc123", ("org/repo", "deep/er/m.pt", "abc123", False)),
        ("org/repo/m.pt@refs/pr/3", ("org/repo", "m.pt", "refs/pr/3", False)),
        ("hf:datasets/org/repo/a.json@v1", ("org/repo", "a.json", "v1", True)),
    ],
)
def test_a_reference_has_parts_and_is_spelled_from_them(text, parts):
    reference = HubReference.parse(text)
    assert reference == HubReference(*parts)
    assert str(reference) == "hf:" + text.removeprefix("hf:")


@pytest.mark.parametrize(
    "text",
    ["", "repo", "org/", "/repo", "org/repo/", "org/repo@", "org/repo/m pt", "a/b@c@d",
     "org/repo/../../x", "org/repo/./x"],
)  # fmt: skip
def test_a_malformed_reference_is_refused_with_the_right_form(text):
    with pytest.raises(ZooError, match=r"hf:\[datasets/\]org/repo\[/path/to/file\]\[@revision\]"):
        HubReference.parse(text)


@pytest.mark.parametrize("name", ["a.json", "deep/model.safetensors"])
def test_a_file_is_downloaded_once_and_its_reference_pinned(hub, files, name):
    head = hub.commits("org/repo")[0].id
    path, pinned = download(HubReference("org/repo", name))
    assert path.read_bytes() == files[name]
    assert str(pinned) == f"hf:org/repo/{name}@{head}"
    asked = len(hub.requests)
    assert download(pinned) == (path, pinned)
    assert len(hub.requests) == asked  # a commit never changes
    hub.push("org/repo", {name: b"newer"})
    assert download(pinned)[0].read_bytes() == files[name]
    assert download(HubReference("org/repo", name))[0].read_bytes() == b"newer"


@pytest.mark.parametrize("home", ["hf", "snapshots/vol/hf", "snapshots/snapshots"])
@pytest.mark.parametrize("name", ["a.json", "snapshots/a.json", "snapshots/b/a.json"])
def test_a_commit_is_found_under_any_folder(hub, tmp_path, monkeypatch, home, name):
    hub.add_repo("org/repo", {name: SMALL})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / home / "hub"))
    path, pinned = download(HubReference("org/repo", name))
    assert path.is_relative_to(tmp_path / home)
    assert str(pinned) == f"hf:org/repo/{name}@{hub.commits('org/repo')[0].id}"


def test_the_files_of_a_repository_are_those_of_one_commit(hub, files):
    names, pinned = files_of(HubReference("org/repo", "a.json"))
    assert set(names) == {*files, ".gitattributes"}
    assert pinned == HubReference("org/repo", None, hub.commits("org/repo")[0].id)


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "the Hub is gone"])
@pytest.mark.usefixtures("files")
def test_what_was_cached_is_found_without_the_hub(hub, monkeypatch, offline):
    reference = HubReference("org/repo", "a.json")
    path, pinned = download(reference)
    if offline:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        hub.stop()
    assert download(reference) == (path, pinned)
    assert files_of(reference) == (("a.json",), HubReference("org/repo", None, pinned.revision))
    with pytest.raises(ZooError, match=r"cannot be reached, and it is not in the local cache"):
        download(reference.file("deep/model.safetensors"))
    with pytest.raises(ZooError, match=r"file list of the model repository 'org/other'"):
        files_of(HubReference("org/other"))


@pytest.mark.parametrize("name", ["a.json", "deep/model.safetensors"])
@pytest.mark.usefixtures("files")
def test_a_dropped_connection_leaves_what_was_cached(hub, name):
    path, pinned = download(HubReference("org/repo", name))
    hub.fault("drop", path=name, times=None)
    assert download(HubReference("org/repo", name)) == (path, pinned)


@pytest.mark.parametrize("kind", ["truncate", "corrupt"])
@pytest.mark.parametrize("name", ["a.json", "deep/model.safetensors"])
def test_a_body_that_arrives_damaged_once_is_asked_for_again(hub, files, name, kind):
    hub.fault(kind, method="GET", path=r"model|a\.json|[0-9a-f]{64}")
    assert download(HubReference("org/repo", name))[0].read_bytes() == files[name]


@pytest.mark.parametrize("kind", ["corrupt", "etag"])
@pytest.mark.parametrize("name", ["a.json", "deep/model.safetensors"])
def test_a_body_that_is_not_what_was_announced_is_refused_and_not_kept(hub, files, name, kind):
    hub.fault(kind, path=r"resolve|[0-9a-f]{64}", times=None)
    for _ in range(2):
        with pytest.raises(ZooError, match="arrived damaged twice"):
            download(HubReference("org/repo", name))
    kept = [path for path in (hub.home / "hub").rglob("*") if path.is_file()]
    assert not [path for path in kept if "blobs" in path.parts or "snapshots" in path.parts]
    hub.heal()
    assert download(HubReference("org/repo", name))[0].read_bytes() == files[name]


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.usefixtures("files")
def test_a_hub_that_is_out_of_order_is_one_clear_error(hub, status):
    hub.fault("status", status=status, times=None)
    with pytest.raises(ZooError, match=r"Cannot get 'a.json' of the model repository 'org/repo'"):
        download(HubReference("org/repo", "a.json"))
    assert not list((hub.home / "hub").rglob("*.incomplete"))


@pytest.mark.usefixtures("files")
def test_the_hubs_refusals_are_told_apart(hub):
    hub.add_repo("org/gated", {"a.json": SMALL}, gated=True)
    for reference, hint in (
        (HubReference("org/none", "a.json"), "no such repository, or a private one"),
        (HubReference("org/repo", "a.json", "v9"), "'org/repo' at revision 'v9'.*no such revision"),
        (HubReference("org/repo", "b.json"), "no such file in the repository"),
        (HubReference("org/gated", "a.json"), "must be requested"),
    ):
        with pytest.raises(ZooError, match=hint):
            download(reference)


def test_a_private_repository_needs_the_token_which_nobody_else_gets(hub, monkeypatch):
    hub.tokens = {"hf_right"}
    hub.add_repo("org/private", {"m.safetensors": LARGE}, private=True)
    with pytest.raises(ZooError, match="a private one"):
        download(HubReference("org/private", "m.safetensors"))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert download(HubReference("org/private", "m.safetensors"))[0].read_bytes() == LARGE
    hub.fault("redirect", method="GET", path="resolve")
    hub.push("org/private", {"m.safetensors": LARGE[1:]})
    download(HubReference("org/private", "m.safetensors"))
    told = {request.host for request in hub.requests if request.authorization}
    assert told == {hub.endpoint.removeprefix("http://")}
    assert len({request.host for request in hub.requests}) > 1


def test_importing_the_module_does_not_import_the_hub_client():
    code = "import sys, zoo.registry.hub_commits; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["../x", "a/../../b", "/etc/x", "c:evil", "a\\..\\b", "a//b"])
def test_a_repository_whose_files_would_leave_their_folder_is_refused(hub, monkeypatch, name):
    hub.add_repo("org/evil", {"a.json": SMALL})
    info = huggingface_hub.HfApi().repo_info("org/evil")
    info.siblings[0].rfilename = name
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: info)
    with pytest.raises(ZooError, match="which no folder can hold safely"):
        files_of(HubReference("org/evil"))
