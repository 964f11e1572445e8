"""References to the Hub, and what a user reads when the Hub does not answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from zoo.errors import ZooError
from zoo.registry.hub import download, list_files, parse_hub_reference


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("org/repo", ("org/repo", None, None)),
        ("org/repo@v1.0", ("org/repo", None, "v1.0")),
        ("org/a.b-c_d/model.safetensors", ("org/a.b-c_d", "model.safetensors", None)),
        ("org/repo/deep/er/m.pt@abc123", ("org/repo", "deep/er/m.pt", "abc123")),
        ("org/repo/m.pt@refs/pr/3", ("org/repo", "m.pt", "refs/pr/3")),
    ],
)
def test_parts_of_a_reference(reference, parts):
    assert parse_hub_reference(reference) == parts


@pytest.mark.parametrize(
    "reference", ["", "repo", "org/", "/repo", "org/repo/", "org/repo@", "org/repo/m pt", "a/b@c@d"]
)
def test_a_malformed_reference_is_refused_with_the_right_form(reference):
    with pytest.raises(ZooError, match=r"org/repo\[/path/to/file\]\[@revision\]"):
        parse_hub_reference(reference)


def test_an_unreachable_hub_is_one_clear_error(tmp_path):
    code = """
import time, zoo.errors
from zoo.registry import hub
time.sleep = lambda seconds: None  # the Hub client waits between its attempts
for ask in (lambda: hub.download("org/repo", "m.pt"), lambda: hub.list_files("org/repo")):
    try:
        ask()
    except zoo.errors.ZooError as error:
        print(error)
"""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.strip().splitlines()
    assert "'m.pt' of the repository 'org/repo'" in first
    assert "cannot be reached" in first
    assert "the file list of the repository 'org/repo'" in second


@pytest.mark.parametrize(
    ("status", "header", "hint"),
    [
        (401, "RepoNotFound", "no such repository"),
        (404, "RevisionNotFound", "no such revision"),
        (404, "EntryNotFound", "no such file"),
        (403, "GatedRepo", "must be requested"),
    ],
)
def test_the_hubs_refusals_are_told_apart(monkeypatch, tmp_path, status, header, hint):
    import http.server
    import threading

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", header)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real, address = huggingface_hub.hf_hub_download, f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *names, **rest: real(*names, **rest, endpoint=address, cache_dir=tmp_path),
    )
    try:
        with pytest.raises(ZooError, match=hint) as caught:
            download("org/repo", "model.safetensors", "v9")
    finally:
        server.shutdown()
        server.server_close()
    assert "'org/repo' at revision 'v9'" in str(caught.value)


def test_files_are_listed_sorted_and_downloads_are_paths(monkeypatch, tmp_path):
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "list_repo_files",
        lambda _self, repo, revision: ["b", repo, revision],
    )
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda _repo, name, revision: f"{tmp_path}/{revision}/{name}",
    )
    assert list_files("a/r", "v1") == ["a/r", "b", "v1"]
    assert download("a/r", "m.pt", "v1") == Path(tmp_path, "v1", "m.pt")


def test_importing_the_module_does_not_import_the_hub_client():
    code = "import sys, zoo.registry.hub; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
