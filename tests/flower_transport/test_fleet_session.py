"""A server that sends what it likes takes no memory of a site, and ends no SuperNode."""

from __future__ import annotations

import resource
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import core_training.foundation.environment  # noqa: F401  isort: skip - before Flower is imported
import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, ObjectTree, PullObjectRequest

from flower_transport.fleet_session import fleet_client
from security.certificates import create_authority, issue_server_certificate
from tests.contracts import test_flower as contracts
from tests.flower_transport.test_supernode import Running

Answer = Callable[[BaseHTTPRequestHandler], None]
MIB = 2**20


class LyingServer:
    """A server over TLS that answers each call as `answer` does."""

    def __init__(self, folder: Path) -> None:
        create_authority(folder)
        issue_server_certificate(folder, ["127.0.0.1"])
        self.authority = folder / "ca.crt"
        self.answer: Answer = lambda call: say(call, b"")
        self.paths: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                server.paths.append(self.path)
                try:
                    server.answer(self)
                except OSError:  # the site has had enough
                    self.close_connection = True

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.address = f"127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def say(call: BaseHTTPRequestHandler, body: bytes, code: int = 200, **headers: str) -> None:
    call.send_response(code)
    for name, value in {"content_length": str(len(body)), **headers}.items():
        call.send_header(name.replace("_", "-"), value)
    call.end_headers()
    call.wfile.write(body)


def packed(call: BaseHTTPRequestHandler) -> None:
    """A few hundred kilobytes that are a gigabyte."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = b"".join(deflate.compress(bytes(64 * MIB)) for _ in range(16)) + deflate.flush()
    say(call, body, content_encoding="gzip")


def endless(call: BaseHTTPRequestHandler) -> None:
    call.send_response(200)
    call.send_header("transfer-encoding", "chunked")
    call.end_headers()
    for _ in range(1024):
        call.wfile.write(b"100000\r\n" + bytes(MIB) + b"\r\n")
    call.wfile.write(b"0\r\n\r\n")


def elsewhere(call: BaseHTTPRequestHandler) -> None:
    say(call, b"", 307, location="/elsewhere")


def no_message(call: BaseHTTPRequestHandler) -> None:
    say(call, b"\xff" * 100)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LyingServer]:
    made = LyingServer(tmp_path_factory.mktemp("lying"))
    yield made
    made.close()


@pytest.mark.parametrize("answer", [packed, endless, elsewhere, no_message])
@pytest.mark.parametrize("call", ["PullMessages", "PullObject"])
def test_what_no_honest_server_sends_is_a_broken_call_and_takes_no_memory(
    server: LyingServer, answer: Answer, call: str
) -> None:
    server.answer, server.paths = answer, []
    request = PullMessagesRequest() if call == "PullMessages" else PullObjectRequest()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        fleet_client(server.address, server.authority, contracts.new_key()[0]) as client,
        pytest.raises(httpx.HTTPError),
    ):
        getattr(client, call)(request)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200 * MIB
    assert "/elsewhere" not in server.paths


def test_an_answer_as_long_as_an_honest_one_is_taken(server: LyingServer) -> None:
    response = PullMessagesResponse(message_object_trees=[ObjectTree(object_id="x" * 30 * MIB)])
    server.answer = lambda call: say(call, response.SerializeToString())
    with fleet_client(server.address, server.authority, contracts.new_key()[0]) as client:
        assert client.PullMessages(PullMessagesRequest()) == response


ORDERS = [
    PullMessagesResponse(messages_list=[MessageProto()]),  # without its parts
    PullMessagesResponse(messages_list=[MessageProto()], message_object_trees=[ObjectTree()]),
    PullMessagesResponse(
        messages_list=[MessageProto(metadata=Metadata(run_id=1, ttl=-1e300, created_at=-1e300, message_type="x"))],
        message_object_trees=[ObjectTree(object_id="x" * 64)],
    ),
]


@pytest.mark.parametrize("order", ORDERS, ids=["no tree", "nothing in it", "of no time"])
def test_an_order_that_is_none_ends_no_supernode(server: LyingServer, tmp_path: Path, order: Any) -> None:
    """It says for how long it could not be answered, and asks again."""
    server.paths = []

    def answer(call: BaseHTTPRequestHandler) -> None:
        activates = call.path.endswith("activate-node")
        pulls = call.path.endswith("pull-messages")
        answered = ActivateNodeResponse(node_id=7) if activates else order if pulls else None
        say(call, answered.SerializeToString() if answered is not None else b"")

    server.answer = answer
    running = Running(server, tmp_path, contracts.new_key()[0])
    try:
        contracts.wait_for(lambda: sum(path.endswith("pull-messages") for path in server.paths) > 2, "its calls")
        assert running.process.poll() is None
        assert running.said("TOLD connected 7")
    finally:
        running.process.kill()
        running.process.wait()
