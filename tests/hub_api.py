"""The answers of a loopback Hub: the part of the Hub's HTTP protocol that needs no xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml
from hub_repositories import Blob, Commit, Repository, goes_to_lfs

__all__ = ["Answer", "HubApi", "Refusal", "Request"]


@dataclass(frozen=True)
class Request:
    """A request as it arrived: `path` with its query, `host` with the port it came to."""

    method: str
    path: str
    host: str
    authorization: str | None
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    @property
    def token(self) -> str | None:
        return self.authorization.removeprefix("Bearer ") if self.authorization else None

    def asks(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error of the Hub, told in its headers and in JSON."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        told = {"X-Error-Code": code} if code else {}
        told |= {"X-Error-Message": message} | {k.replace("_", "-"): v for k, v in headers.items()}
        self.answer = reply({"error": message}, status, **told)


def reply(value: Any, status: int = 200, **headers: str) -> Answer:
    content = {"Content-Type": "application/json"}
    return Answer(status, json.dumps(value).encode(), content | headers)


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """All of `content`, or the bytes that the request's Range names."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return Answer(200, content, headers)
    start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if start > end:
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
    span = f"bytes {start}-{end}/{len(content)}"
    return Answer(206, content[start : end + 1], headers | {"Content-Range": span})


class HubApi:
    """Repositories, stored objects and who may do what; `answer` speaks for them.

    `tokens` and `readers` are the known tokens, with and without the right to write. While both
    are empty everybody may do everything.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.readers: set[str] = set()
        self.unknown: list[Request] = []
        self.page_size = 1000
        self.endpoint = self.storage = ""

    def answer(self, request: Request, doors: Iterable[str]) -> Answer:
        """What the Hub ("hub"), its storage ("storage") or a mirror of both says to a request."""
        path = urlsplit(request.path).path
        for door, methods, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and door in doors and request.method in methods.split("|"):
                parts = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                try:
                    if door == "hub":
                        self._check_token(request)
                    return handle(self, request, **parts)
                except Refusal as refusal:
                    return refusal.answer
        self.unknown.append(request)
        return reply({"error": f"This Hub does not know {request.method} {path}."}, 501)

    def _check_token(self, request: Request) -> None:
        known = self.tokens | self.readers
        if known and request.token is not None and request.token not in known:
            raise Refusal(401, "Invalid credentials in Authorization header")

    def _may(self, request: Request) -> bool:
        known = self.tokens | self.readers
        return not known or request.token in known

    def _writer(self, request: Request) -> None:
        if not self._may(request):
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if request.token in self.readers - self.tokens:
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")

    def _repository(self, request: Request, kind: str, repo: str) -> Repository:
        found = self.repositories.get((kind.removesuffix("s"), repo))
        if found is None or (found.private and not self._may(request)):
            status = 404 if request.token else 401
            raise Refusal(status, "Repository not found", "RepoNotFound")
        return found

    def _at(
        self, request: Request, kind: str, repo: str, revision: str = "main"
    ) -> tuple[Repository, Commit]:
        found = self._repository(request, kind, repo)
        commit = found.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, commit

    def _url(self, repository: Repository) -> str:
        prefix = "" if repository.kind == "model" else f"{repository.kind}s/"
        return f"{self.endpoint}/{prefix}{repository.id}"

    def _page(self, request: Request, rows: list[Any], size: int | None = None) -> Answer:
        """One page of `rows`, which names the next one as the Hub does, in a Link header."""
        size, start = size or self.page_size, int(request.query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(rows):
            query = urlencode(request.query | {"cursor": [str(start + size)]}, doseq=True)
            url = f"{self.endpoint}{urlsplit(request.path).path}?{query}"
            headers["Link"] = f'<{url}>; rel="next"'
        return reply(rows[start : start + size], **headers)

    def whoami(self, request: Request) -> Answer:
        if request.token is None:
            raise Refusal(401, "Invalid username or password.")
        role = "read" if request.token in self.readers - self.tokens else "write"
        token = {"displayName": "test", "role": role}
        user = {"type": "user", "name": "tester", "orgs": [{"type": "org", "name": "zoo"}]}
        return reply(user | {"auth": {"type": "access_token", "accessToken": token}})

    def create(self, request: Request) -> Answer:
        self._writer(request)
        asked = json.loads(request.body)
        kind, name = (
            asked.get("type", "model"),
            f"{asked['organization'] or 'tester'}/{asked['name']}",
        )
        old = self.repositories.get((kind, name))
        if old is not None:
            error = {"error": f"You already created this {kind} repo", "url": self._url(old)}
            return reply(error, 409)
        private = asked.get("visibility") == "private"
        new = self.repositories[kind, name] = Repository(name, kind, private)
        return reply({"url": self._url(new), "name": name, "id": new.head.id[:24]})

    def delete(self, request: Request) -> Answer:
        self._writer(request)
        asked = json.loads(request.body)
        name = f"{asked['organization'] or 'tester'}/{asked['name']}"
        found = self._repository(request, asked.get("type", "model"), name)
        del self.repositories[found.kind, found.id]
        return Answer()

    def validate(self, request: Request) -> Answer:
        """Errors of a card's head: only whether it is YAML, and a mapping."""
        asked = json.loads(request.body)
        probe = Repository("probe", asked["repoType"])
        probe.add({"README.md": Blob(asked["content"].encode(), False)}, "probe")
        try:
            told = [] if isinstance(probe.card, dict) else [{"message": "not a mapping"}]
        except yaml.YAMLError as error:
            told = [{"message": str(error)}]
        return reply({"errors": told, "warnings": []}, 400 if told else 200)

    def listing(self, request: Request, kind: str) -> Answer:
        query = request.query
        wanted = {tag for value in query.get("filter", []) for tag in value.split(",")}
        rows = [
            repository.summary(
                repository.head, full=request.asks("full"), expand=query.get("expand", [])
            )
            for (of, _), repository in sorted(self.repositories.items())
            if of == kind.removesuffix("s")
            and wanted <= set(repository.tags)
            and (not repository.private or self._may(request))
            and repository.id.startswith(tuple(f"{a}/" for a in query.get("author", [])) or "")
            and query.get("search", [""])[0].lower() in repository.id.lower()
        ]
        return self._page(request, rows, int(query.get("limit", [self.page_size])[0]))

    def info(self, request: Request, **at: str) -> Answer:
        repository, commit = self._at(request, **at)
        expand, sizes = request.query.get("expand", []), request.asks("blobs")
        return reply(repository.summary(commit, full=True, expand=expand, sizes=sizes))

    def tree(self, request: Request, path: str = "", **at: str) -> Answer:
        repository, commit = self._at(request, **at)
        rows = repository.tree(commit, path, request.asks("recursive"))
        if path and not rows:
            raise Refusal(404, f"{path} does not exist on this revision", "EntryNotFound")
        return self._page(request, rows)

    def paths_info(self, request: Request, **at: str) -> Answer:
        repository, commit = self._at(request, **at)
        wanted = parse_qs(request.body.decode()).get("paths", [])
        rows = {row["path"]: row for row in repository.tree(commit, "", recursive=True)}
        return reply([rows[path] for path in wanted if path in rows])

    def history(self, request: Request, **at: str) -> Answer:
        repository, commit = self._at(request, **at)
        known = repository.commits[: repository.commits.index(commit) + 1]
        author = {"authors": [{"user": "tester"}]}
        rows = [
            {"id": c.id, "title": c.title, "message": c.message, "date": c.date} | author
            for c in reversed(known)
        ]
        return self._page(request, rows)

    def tag(self, request: Request, **at: str) -> Answer:
        self._writer(request)
        repository, commit = self._at(request, **at)
        name = json.loads(request.body)["tag"]
        if name in repository.git_tags:
            raise Refusal(409, f"Tag {name} already exists")
        repository.git_tags[name] = commit.id
        return reply({"ref": f"refs/tags/{name}"})

    def preupload(self, request: Request, **at: str) -> Answer:
        """How each file is to travel, and the id of what lies at its path."""
        self._writer(request)
        _, commit = self._at(request, **at)
        rows = []
        for file in json.loads(request.body)["files"]:
            path, old = file["path"], commit.files.get(file["path"])
            large = goes_to_lfs(path, base64.b64decode(file["sample"]), file["size"])
            mode = {"path": path, "uploadMode": "lfs" if large else "regular"}
            rows.append(mode | {"shouldIgnore": False} | ({"oid": old.etag} if old else {}))
        return reply({"files": rows, "commitOid": commit.id})

    def lfs_batch(self, request: Request, repo: str, kind: str = "model") -> Answer:
        self._writer(request)
        url = self._url(self._repository(request, kind, repo))
        rows = []
        for wanted in json.loads(request.body)["objects"]:
            upload = {"href": f"{self.storage}/objects/{wanted['oid']}"}
            verify = {"href": f"{url}.git/info/lfs/verify"}
            held = wanted["oid"] in self.objects
            rows.append(
                wanted | ({} if held else {"actions": {"upload": upload, "verify": verify}})
            )
        return reply({"transfer": "basic", "objects": rows})

    def lfs_verify(self, request: Request, repo: str, kind: str = "model") -> Answer:
        self._writer(request)
        self._repository(request, kind, repo)
        asked = json.loads(request.body)
        if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "The object was not uploaded")
        return reply({})

    def store(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            return Answer(400, b"<Error><Code>BadDigest</Code></Error>")
        self.objects[oid] = request.body
        return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def serve(self, request: Request, oid: str) -> Answer:
        if oid not in self.objects:
            return Answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return ranged(request, self.objects[oid], {"ETag": f'"{oid}"'})

    def commit(self, request: Request, **at: str) -> Answer:
        """A commit from its lines of JSON: a header, then what is added and deleted."""
        self._writer(request)
        repository, _ = self._at(request, **at)
        lines = [json.loads(line) for line in request.body.splitlines()]
        head, files = lines[0]["value"], dict(repository.head.files)
        if not repository.head.id.startswith(head.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, f"{path} points to an object that was not uploaded")
                files[path] = Blob(self.objects[value["oid"]], True)
            else:
                folder = line["key"] == "deletedFolder"
                gone = [
                    p
                    for p in files
                    if (p.startswith(f"{path.rstrip('/')}/") if folder else p == path)
                ]
                if not gone:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {p: blob for p, blob in files.items() if p not in gone}
        new = repository.add(files, head["summary"], head.get("description", ""))
        url = f"{self._url(repository)}/commit/{new.id}"
        return reply({"success": True, "commitOid": new.id, "commitUrl": url, "hookOutput": ""})

    def resolve(self, request: Request, path: str, kind: str = "model", **at: str) -> Answer:
        """A file's bytes, or where the storage has them; HEAD tells the same without a body."""
        repository, commit = self._at(request, kind, **at)
        if repository.gated:
            status = 403 if request.token else 401
            raise Refusal(status, f"Access to {kind} {repository.id} is restricted.", "GatedRepo")
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.id)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if not blob.lfs:
            return ranged(request, blob.content, headers | {"ETag": f'"{blob.etag}"'})
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        headers |= {"ETag": f'"{blob.git_id}"', "Location": f"{self.storage}/objects/{blob.etag}"}
        return Answer(302, b"", headers)


API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, str, Callable[..., Answer]]] = [
    ("hub", "GET", "/api/whoami-v2", HubApi.whoami),
    ("hub", "POST", "/api/repos/create", HubApi.create),
    ("hub", "DELETE", "/api/repos/delete", HubApi.delete),
    ("hub", "POST", "/api/validate-yaml", HubApi.validate),
    ("hub", "GET", "/api/(?P<kind>models|datasets)", HubApi.listing),
    ("hub", "GET", f"{API}(?:/revision/{REVISION})?", HubApi.info),
    ("hub", "GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?", HubApi.tree),
    ("hub", "POST", f"{API}/paths-info/{REVISION}", HubApi.paths_info),
    ("hub", "GET", f"{API}/commits/{REVISION}", HubApi.history),
    ("hub", "POST", f"{API}/tag/{REVISION}", HubApi.tag),
    ("hub", "POST", f"{API}/preupload/{REVISION}", HubApi.preupload),
    ("hub", "POST", f"{API}/commit/{REVISION}", HubApi.commit),
    ("hub", "POST", rf"{PAGE}\.git/info/lfs/objects/batch", HubApi.lfs_batch),
    ("hub", "POST", rf"{PAGE}\.git/info/lfs/verify", HubApi.lfs_verify),
    ("hub", "GET|HEAD", f"{PAGE}/resolve/{REVISION}/(?P<path>.+)", HubApi.resolve),
    ("storage", "GET|HEAD", "/objects/(?P<oid>[0-9a-f]{64})", HubApi.serve),
    ("storage", "PUT", "/objects/(?P<oid>[0-9a-f]{64})", HubApi.store),
]
