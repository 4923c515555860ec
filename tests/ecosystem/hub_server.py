"""A hub on loopback: the part of its HTTP interface with which huggingface_hub makes, writes and reads repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"


@dataclass
class Repo:
    """A repository: files by commit, commits by branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Add a commit with these files to a branch; its id."""
        tree = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(tree)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a branch, or the commit itself."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """Its repositories, and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.cut: set[str] = set()
        """Files whose next download breaks off half-way."""
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def given(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def repo(self, name: str) -> Repo | None:
        """The repository, if there is one that this caller may read; else the hub's answer is sent."""
        found = self.hub.repos.get(name)
        if self.token() not in (None, TOKEN):
            self.refuse(401, "")
        elif found is None or (found.private and self.token() != TOKEN):
            self.refuse(401 if self.token() is None else 404, "RepoNotFound")
        else:
            return found
        return None

    # ---- reading
    def do_HEAD(self) -> None:
        self.read()

    def do_GET(self) -> None:
        self.read()

    def read(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (repo := self.repo(match[1])) is not None:
                self.file(repo, match[2], match[3])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if (repo := self.repo(match[1])) is not None:
                self.info(match[1], repo, match[2] or "main")
        else:
            self.refuse(404, "")

    def info(self, name: str, repo: Repo, revision: str) -> None:
        sha = repo.find(revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        return self.json({"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in repo.commits[sha]]})

    def file(self, repo: Repo, revision: str, name: str) -> None:
        sha = repo.find(revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        body = repo.commits[sha].get(name)
        if body is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        headers = {"X_Repo_Commit": sha, "ETag": etag, "Accept_Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if self.command == "GET" and name in self.hub.cut:
            self.hub.cut.discard(name)
            return self.break_off(body, headers)
        if start:
            first = int(start[1])
            headers["Content_Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            return self.answer(206, body[first:], **headers)
        return self.answer(200, body, **headers)

    def break_off(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True

    # ---- writing
    def do_POST(self) -> None:
        body = self.given()
        if self.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if self.token() != TOKEN:
            return self.refuse(401, "")
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/?]+).*", self.path)
        repo = self.hub.repos.get(match[1]) if match else None
        if match is None or repo is None:
            return self.refuse(404, "RepoNotFound")
        if match[2] == "branch":
            repo.refs.setdefault(match[3], repo.refs.get("main", ""))
            return self.json({})
        if match[2] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.json({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        return self.commit(match[1], repo, match[3], body)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repos:
            return self.answer(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
        made = self.hub.repos[name] = Repo(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        made.commit("main", {".gitattributes": b""})
        return self.json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def commit(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        values = [line["value"] for line in lines if line["key"] == "file"]
        sha = repo.commit(branch, {value["path"]: base64.b64decode(value["content"]) for value in values})
        self.json({"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers on loopback while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
