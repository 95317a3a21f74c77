"""A hub on loopback: the few addresses that huggingface_hub asks for a model, with a count of all that was asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")
"""Files that the hub names by their SHA-256; the others have git's hash."""


@dataclass
class Asked:
    """One request: its method, its path, and the token that came with it."""

    method: str
    path: str
    token: str | None


@dataclass
class Repository:
    """A model on the hub: the files of each commit, and what its branches and tags point at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    """The token without which nobody is given a file (a gated model)."""

    def commit_of(self, revision: str) -> str | None:
        commit = self.references.get(revision, revision)
        return commit if commit in self.commits else None


class StandInHub:
    """What the server has, what it was asked, and how it is to spoil what it sends."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.repositories: dict[str, Repository] = {}
        self.asked: list[Asked] = []
        self.spoilt: dict[str, bytes] = {}
        """What is sent in the place of a file, by its name."""
        self.claimed_sizes: dict[str, int] = {}
        """The size that is listed in the place of a file's own, by its name."""
        self.halfway: dict[str, Callable[[], None]] = {}
        """What is done when half of a file has been sent, by its name."""

    def add(self, name: str, folder: Path, revision: str = "main", **more: bytes) -> str:
        """Put a model's files on a branch; `more` are further files, by their names. Returns the commit."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        files |= more
        commit = _git_hash(repr(sorted((file, _git_hash(data)) for file, data in files.items())).encode())
        repository = self.repositories.setdefault(name, Repository())
        repository.commits[commit] = files
        repository.references[revision] = commit
        return commit

    def fetched(self) -> list[str]:
        """The names of the files that were asked for, and not only asked about."""
        paths = [one.path for one in self.asked if one.method == "GET" and "/resolve/" in one.path]
        return [path.partition("/resolve/")[2].partition("/")[2] for path in paths]


def _etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else _git_hash(data)


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes, size: int) -> dict[str, Any]:
    """A file as both listings of the hub have it."""
    entry: dict[str, Any] = {"type": "file", "path": name, "rfilename": name, "size": size}
    entry["oid"] = entry["blobId"] = _git_hash(data)
    if name.endswith(LARGE):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 130}
    return entry


def _listing(hub: StandInHub, files: dict[str, bytes], kind: str, commit: str) -> bytes:
    """The files of a commit, by themselves (`tree`) or with what else is told of a model."""
    entries = [_entry(name, data, hub.claimed_sizes.get(name, len(data))) for name, data in files.items()]
    return json.dumps(entries if kind == "tree" else {"id": "model", "sha": commit, "siblings": entries}).encode()


def _handler(hub: StandInHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def log_message(self, *_: object) -> None:
            pass

        def _serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            hub.asked.append(Asked(self.command, path, token))
            name = path.removeprefix("/api/models/").removeprefix("/")
            found = next((known for known in hub.repositories if name == known or name.startswith(f"{known}/")), None)
            if found is None:
                self._refuse(401, "RepoNotFound")
            else:
                self._answer(hub.repositories[found], name.removeprefix(found).strip("/"), token)

        def _answer(self, repository: Repository, rest: str, token: str | None) -> None:
            kind, _, more = rest.partition("/")
            revision, _, file = (more or "main").partition("/")
            commit = repository.commit_of(revision)
            if commit is None:
                self._refuse(404, "RevisionNotFound")
            elif kind != "resolve":
                self._send(_listing(hub, repository.commits[commit], kind, commit), commit, "listing")
            elif repository.token not in (None, token):
                self._refuse(403, "GatedRepo")
            elif (data := repository.commits[commit].get(file)) is None:
                self._refuse(404, "EntryNotFound")
            else:
                self._send(hub.spoilt.get(file, data), commit, _etag(file, data), hub.halfway.get(file))

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, data: bytes, commit: str, etag: str, halfway: Callable[[], None] | None = None) -> None:
            self.send_response(200)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "GET":
                return
            self.wfile.write(data[: len(data) // 2])
            if halfway is not None:
                halfway()
            with suppress(OSError):  # whoever asked may be gone
                self.wfile.write(data[len(data) // 2 :])

    return Handler


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """A hub without models, on a port of this machine's choice."""
    hub = StandInHub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
