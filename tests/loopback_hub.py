"""A Hugging Face Hub on loopback for the real client, with faults that are real on the wire.

It listens on three ports: the endpoint; its storage, which holds large files and must never see a
token; and `elsewhere`, a mirror of both where redirects lead. What it says needs no xet, which
uploads would use unasked: `attach` and `environment` switch xet off in the client.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from hub_api import Answer, HubApi, Request
from hub_repositories import Blob, Commit, Repository, goes_to_lfs

__all__ = ["LoopbackHub", "Request"]

BEFORE = ("delay", "status", "drop", "redirect")
AFTER = ("drop-after", "truncate", "corrupt", "etag")


@dataclass
class Fault:
    """What goes wrong with the next `times` requests (None: all) of a method and path."""

    kind: str
    method: str | None
    path: str
    times: int | None
    seconds: float = 1.0
    status: int | None = None
    to: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def meets(self, request: Request) -> bool:
        return self.method in (None, request.method) and bool(re.search(self.path, request.path))

    def touches(self, request: Request, answer: Answer) -> bool:
        """Whether there is something to spoil in the answer."""
        if self.kind in ("truncate", "corrupt"):
            return request.method != "HEAD" and answer.status < 300 and len(answer.body) > 1
        return self.kind != "etag" or "ETag" in answer.headers


class LoopbackHub(HubApi):
    """Serves until `stop`, also as a context manager; `home` is where its clients keep things."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.home = home
        self.requests: list[Request] = []
        self.sleeps: list[float] = []
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._servers = [_Server(self, doors) for doors in ("hub", "storage", "hub storage")]
        self.endpoint, self.storage, self.elsewhere = (server.url for server in self._servers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on and cut those that are open."""
        if not self._stopped.is_set():
            self._stopped.set()
            for server in self._servers:
                server.stop()

    @property
    def environment(self) -> dict[str, str]:
        """This process' environment for a subprocess whose client is to talk to this Hub."""
        inherited = {k: v for k, v in os.environ.items() if not _is_of_the_client(k)}
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def attach(self, patch: pytest.MonkeyPatch) -> None:
        """Make the client of this process talk to this Hub, with an empty cache and no waiting.

        The client reads its environment when it is imported; `sleeps` gets the seconds it would
        have waited between its attempts.
        """
        import huggingface_hub
        from huggingface_hub import constants, file_download, hf_api
        from huggingface_hub.utils import _http

        for name in filter(_is_of_the_client, list(os.environ)):
            patch.delenv(name)
        for name, value in self.environment.items():
            patch.setenv(name, value)
        cache = self.home / "hub"
        for name, value in {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(self.home),
            "HF_HUB_CACHE": str(cache),
            "HUGGINGFACE_HUB_CACHE": str(cache),
            "HF_ASSETS_CACHE": str(self.home / "assets"),
            "HF_TOKEN_PATH": str(self.home / "token"),
            "HF_STORED_TOKENS_PATH": str(self.home / "stored_tokens"),
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", self.endpoint)
        origins = _http._HUB_ORIGINS | {_http._url_origin(self.endpoint)}
        patch.setattr(_http, "_HUB_ORIGINS", origins)
        # Progress bars have read the environment themselves.
        bars = sys.modules["huggingface_hub.utils.tqdm"]
        patch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        clock = SimpleNamespace(**vars(time) | {"sleep": self.sleeps.append})
        for module in (_http, file_download):
            patch.setattr(module, "time", clock)
        huggingface_hub.close_session()

    def add_repo(
        self,
        repo: str,
        files: dict[str, bytes] | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool = False,
        tags: Collection[str] = (),
    ) -> str:
        """A repository with `files` in a second commit, after that of the Hub; its head's id."""
        new = Repository(repo, repo_type, private, gated, tuple(tags))
        self.repositories[repo_type, repo] = new
        return self.push(repo, files, repo_type=repo_type) if files else new.head.id

    def push(
        self, repo: str, files: dict[str, bytes], title: str = "push", *, repo_type: str = "model"
    ) -> str:
        """A commit that adds or replaces `files`, made by somebody else; its id."""
        with self._lock:
            repository = self.repositories[repo_type, repo]
            blobs = {p: Blob(b, goes_to_lfs(p, b[:512], len(b))) for p, b in files.items()}
            self.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
            return repository.add(repository.head.files | blobs, title).id

    def files(
        self, repo: str, revision: str | None = None, *, repo_type: str = "model"
    ) -> dict[str, bytes]:
        commit = self.repositories[repo_type, repo].at(revision or "main")
        if commit is None:
            raise KeyError(revision)
        return {path: blob.content for path, blob in commit.files.items()}

    def commits(self, repo: str, *, repo_type: str = "model") -> list[Commit]:
        """The commits of main, newest first."""
        return self.repositories[repo_type, repo].commits[::-1]

    def fault(
        self,
        kind: str,
        *,
        method: str | None = None,
        path: str = "",
        times: int | None = 1,
        **how: Any,
    ) -> None:
        """Spoil the next `times` requests of a method whose path `path` is found in.

        "delay" waits `seconds`; "status" answers `status` with `headers`; "drop" closes the
        connection unanswered, "drop-after" does so when the request has been carried out;
        "redirect" leads to `to`, or to the same path elsewhere, from where it leads no further
        (`status` is 503 unless given, 302 for a redirect); "truncate" sends half of what
        Content-Length says, "corrupt" flips the bytes of a body and "etag" sends a wrong ETag.
        """
        if kind not in BEFORE + AFTER:
            raise ValueError(f"no fault {kind!r}, only {', '.join(BEFORE + AFTER)}")
        self._faults.append(Fault(kind, method, path, times, **how))

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def seen(self, method: str = "", path: str = "") -> list[Request]:
        """The requests so far whose method and path the patterns are found in."""
        with self._lock:
            return [
                r for r in self.requests if re.search(method, r.method) and re.search(path, r.path)
            ]

    def _take(
        self, kinds: tuple[str, ...], request: Request, answer: Answer | None = None
    ) -> Fault | None:
        """The first fault of these kinds that the request meets, which is used up by it."""
        with self._lock:
            for fault in self._faults:
                if fault.kind not in kinds or fault.times == 0 or not fault.meets(request):
                    continue
                if answer is None or fault.touches(request, answer):
                    fault.times = fault.times and fault.times - 1
                    return fault
        return None

    def react(self, request: Request, doors: str) -> tuple[Answer | None, int | None]:
        """The answer to send, None to hang up; and after how many bytes of its body to hang up."""
        with self._lock:
            self.requests.append(request)
        if delay := self._take(("delay",), request):
            self._stopped.wait(delay.seconds)
        mirrored = self.elsewhere == f"http://{request.host}"
        fault = self._take(BEFORE[1:3] if mirrored else BEFORE[1:], request)
        if fault and fault.kind == "drop":
            return None, None
        if fault and fault.kind == "status":
            return Answer(fault.status or 503, b"", fault.headers), None
        if fault and fault.kind == "redirect":
            to = fault.to or self.elsewhere + request.path
            return Answer(fault.status or 302, b"", {"Location": to} | fault.headers), None
        with self._lock:
            answer = self.answer(request, doors.split())
        fault = self._take(AFTER, request, answer)
        if fault and fault.kind == "drop-after":
            return None, None
        if fault and fault.kind == "truncate":
            return answer, len(answer.body) // 2
        if fault and fault.kind == "corrupt":
            answer = replace(answer, body=bytes(255 - byte for byte in answer.body))
        if fault and fault.kind == "etag":
            named = {
                k: re.sub(r"\w", "0", v) for k, v in answer.headers.items() if "etag" in k.lower()
            }
            answer = replace(answer, headers=answer.headers | named)
        return answer, None


def _is_of_the_client(variable: str) -> bool:
    return variable.startswith(("HF_", "HUGGING")) or variable == "TRANSFORMERS_OFFLINE"


class _Server(ThreadingHTTPServer):
    """One port of a Hub, served by threads until `stop`."""

    daemon_threads = True

    def __init__(self, hub: LoopbackHub, doors: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.doors, self.host = hub, doors, f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}"
        self.open: set[socket.socket] = set()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        token, body = headers.get("authorization"), self.rfile.read(length)
        request = Request(self.command, self.path, self.server.host, token, headers, body)
        answer, limit = self.server.hub.react(request, self.server.doors)
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:limit])
        self.close_connection = self.close_connection or limit is not None

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_: object) -> None:
        pass
