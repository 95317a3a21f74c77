"""The gate before the SuperLink: which calls reach Flower, made by whom, with which bundle."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab

from core_training.foundation.errors import InputError
from flower_transport.bodies import SMALL_BYTES
from flower_transport.bundle import BUNDLE, packed_bundle
from flower_transport.credential import HEADER, make_credential, read_credential
from flower_transport.gate import OPEN_TO_OPERATOR, OPEN_TO_SITES, START_RUN, Gate

CREDENTIAL = "c" * 64
SHOWN = [(HEADER.encode(), CREDENTIAL.encode())]


def ask(path: str, headers: list[tuple[bytes, bytes]], *parts: bytes, client: str = "127.0.0.1") -> tuple[int, bytes]:
    """The gate's status for a call, and the body that reached Flower through it."""
    statuses: list[int] = []
    came = bytearray()
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            came.extend(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "path": path, "headers": headers, "client": (client, 40000), "server": (client, 9092)}
    asyncio.run(Gate(flower, CREDENTIAL)(scope, receive, send))
    assert len(statuses) == 1
    return statuses[0], bytes(came)


@pytest.mark.parametrize("path", sorted(OPEN_TO_OPERATOR))
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(HEADER.encode(), b"")],
        [(HEADER.encode(), CREDENTIAL[:-1].encode())],
        [(HEADER.encode(), b"d" * 64)],
        [(HEADER.encode(), b"d" * 64), *SHOWN],
        [*SHOWN, *SHOWN],
        [(b"x-forwarded-for", b"127.0.0.1"), (b"authorization", CREDENTIAL.encode())],
    ],
    ids=["none", "empty", "cut", "another", "two", "twice", "elsewhere"],
)
def test_no_call_of_the_operators_is_answered_without_the_credential_wherever_it_comes_from(
    path: str, headers: list[tuple[bytes, bytes]]
) -> None:
    for client in ("127.0.0.1", "::1", "203.0.113.7"):
        assert ask(path, headers, client=client) == (403, b"")


@pytest.mark.parametrize("path", sorted(OPEN_TO_OPERATOR - {START_RUN}))
def test_who_shows_the_credential_operates(path: str) -> None:
    assert ask(path, SHOWN, b"bo", b"dy") == (200, b"body")


@pytest.mark.parametrize("path", sorted(OPEN_TO_SITES))
def test_sites_reach_what_is_theirs(path: str) -> None:
    assert ask(path, [], b"body", client="203.0.113.7") == (200, b"body")


@pytest.mark.parametrize(
    "path",
    [
        *("/docs", "/openapi.json", "/v1/responses", "/v1/control/start-automation", "/v1/runtime/start-automation"),
        *("/v1/control/add-app", "/v1/runtime/create-task", "/v1/runtime/push-task-message", "/nowhere"),
        *("/v1/fleet", "/v1/fleet/", "/v1/fleet/nowhere", "/health/", "/v1/fleet/../control/list-runs"),
    ],
)
def test_what_fedloom_does_not_call_answers_nobody(path: str) -> None:
    for headers in ([], SHOWN):
        assert ask(path, headers) == (403, b"")


def test_a_websocket_is_closed() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def nothing(*_: Any) -> Any:
        raise AssertionError("reached Flower")

    asyncio.run(Gate(nothing, CREDENTIAL)({"type": "websocket", "path": "/health", "headers": SHOWN}, nothing, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def start_run(files: Mapping[str, bytes | Path] | None = None, **other: Any) -> bytes:
    content = packed_bundle() if files is None else build_fab_from_files(files)[0]
    fab = Fab(hash_str=hashlib.sha256(packed_bundle()).hexdigest(), content=content)
    return StartRunRequest(fab=fab, **other).SerializeToString()


def test_fedlooms_own_bundle_starts_a_run_and_reaches_flower_as_it_was_sent() -> None:
    body = start_run()
    assert ask(START_RUN, SHOWN, body[:100], body[100:]) == (200, body)


@pytest.mark.parametrize(
    "body",
    [
        start_run({**BUNDLE, "evil.py": b"print('here')"}),
        start_run({**BUNDLE, "README.md": b"another"}),
        StartRunRequest(fab=Fab(hash_str=hashlib.sha256(packed_bundle()).hexdigest())).SerializeToString(),
        start_run(app_spec="@somebody/app"),
        start_run(federation="@none/other"),
        start_run(user_prompt="run this"),
        start_run()[:-3],
        b"\xff" * 100,
        b"",
    ],
    ids=["code", "text", "hash alone", "app", "federation", "prompt", "cut", "noise", "nothing"],
)
def test_a_run_with_another_bundle_is_refused_to_the_operator_too(body: bytes) -> None:
    assert ask(START_RUN, SHOWN, body) == (403, b"")


def test_a_bundle_is_not_read_beyond_its_limit() -> None:
    parts = [b"x" * 1024] * (SMALL_BYTES // 1024 + 1)
    assert ask(START_RUN, SHOWN, *parts) == (413, b"")


def test_each_start_makes_a_credential_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "operator.credential"
    make_credential(path)
    first = read_credential(path)
    make_credential(path)
    assert read_credential(path) != first
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["gone", "cut", "read by others"])
def test_without_a_whole_credential_of_its_own_no_superlink_starts(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "operator.credential"
    make_credential(path)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(b"")
    else:
        path.chmod(0o644)
    with pytest.raises(InputError, match="operator"):
        read_credential(path)
