"""A site's SuperNode at a real SuperLink: what it tells of its standing, how it answers, and what leaves the site."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import core_training.foundation.environment  # noqa: F401  isort: skip - before Flower is imported
import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest
from flwr.proto.fleet_pb2 import PushMessagesResponse
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.retry import RetryState, make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from client import worker_socket
from client.app import SITE_FOLDER, WORKER_FAILED, app
from core_training.foundation.errors import RunError
from flower_transport import supernode
from flower_transport.apps import make_client_app
from flower_transport.grid import FlowerGrid
from flower_transport.records import from_message, to_messages
from strategies.messages import Envelope, Refusal
from tests.contracts import test_flower as contracts
from tests.flower_transport import test_arrivals as arrivals
from tests.flower_transport.test_intake import not_json, repeating, tree_of

superlink, grid = contracts.superlink, arrivals.grid

ECHOING = """
import sys
from pathlib import Path
import core_training.foundation.environment
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from core_training.foundation.careful_logging import log_to_stdout
from core_training.foundation.stopping import exit_when_stopped
from flower_transport.apps import make_client_app
from flower_transport.supernode import SuperNode
from strategies.messages import Envelope

log_to_stdout()
exit_when_stopped()
server, authority, key = sys.argv[1:]

def answer(order, node):
    if order.fields.get("fails"):
        raise RuntimeError("a secret of the site's")
    return Envelope("echo", order.text, order.payload)

SuperNode(
    make_client_app(answer),
    server,
    Path(authority),
    load_ssh_private_key(Path(key).read_bytes(), None),
    lambda *said: print("TOLD", *said, flush=True),
    max_message_bytes=2**24,
).run()
"""


class Running:
    """A SuperNode in a process of its own that sends each order back."""

    def __init__(self, link: Any, folder: Path, key: Any) -> None:
        (folder / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", ECHOING, link.address, str(link.authority), str(folder / "key")],
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )

    def said(self, words: str) -> bool:
        return words in self.log.read_text()


@pytest.fixture(scope="module")
def running(superlink: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, int]]:
    """A SuperNode of an admitted site, which is connected, and its number."""
    key, pem = contracts.new_key()
    number = superlink.control().RegisterNode(RegisterNodeRequest(public_key=pem, name="echo")).node_id
    started = Running(superlink, tmp_path_factory.mktemp("echo"), key)
    try:
        contracts.wait_for(lambda: started.said(f"TOLD connected {number}"), "the SuperNode")
        yield started, number
    finally:
        started.process.kill()
        started.process.wait()


def status(link: Any, number: int) -> str:
    (node,) = [node for node in link.control().ListNodes(ListNodesRequest()).nodes_info if node.node_id == number]
    return str(node.status)


def test_a_site_that_is_connected_says_so_and_opens_no_port(superlink: Any, running: tuple[Running, int]) -> None:
    supernode, number = running
    assert status(superlink, number) == "online"
    opened = psutil.Process(supernode.process.pid).net_connections("inet")
    assert [one.laddr for one in opened if one.status == psutil.CONN_LISTEN] == []


def test_orders_are_answered_one_after_the_other_as_soon_as_they_are_there(
    superlink: Any, running: tuple[Running, int], grid: HttpGrid
) -> None:
    flower, number = FlowerGrid(grid), running[1]
    for size in (0, 1000, 2**21):
        flower.allow_payloads(size)
        began = time.monotonic()
        (order,) = flower.send({number: Envelope.of("say", {"size": size}, b"x" * size)}, ttl=60)
        (reply,) = arrivals.replies(flower, [order], 1).values()
        assert reply.envelope() == Envelope.of("echo", {"size": size}, b"x" * size)
        assert time.monotonic() - began < 3
        time.sleep(0.5)  # at rest: its call for orders is held


def test_what_goes_wrong_at_a_site_is_told_there_alone_and_the_next_order_is_answered(
    superlink: Any, running: tuple[Running, int], grid: HttpGrid
) -> None:
    flower, (supernode, number) = FlowerGrid(grid), running
    (order,) = flower.send({number: Envelope.of("say", {"fails": True})}, ttl=60)
    (reply,) = arrivals.replies(flower, [order], 1).values()
    with pytest.raises(Exception, match=r"the site's own logs/supernode\.log says why") as failed:
        reply.envelope()
    assert "secret" not in str(failed.value)
    assert supernode.said("a secret of the site's")
    (order,) = flower.send({number: Envelope.of("say", {})}, ttl=60)
    assert arrivals.replies(flower, [order], 1)[order].envelope().kind == "echo"


def test_an_order_that_is_too_long_is_refused_and_the_next_one_answered(
    superlink: Any, running: tuple[Running, int], grid: HttpGrid
) -> None:
    flower, number = FlowerGrid(grid), running[1]
    (order,) = flower.send({number: Envelope.of("say", {}, bytes(2**27 + 2**26))}, ttl=60)
    with pytest.raises(Exception, match=r"supernode\.log says why"):
        arrivals.replies(flower, [order], 1, within=60)[order].envelope()
    (order,) = flower.send({number: Envelope.of("say", {})}, ttl=60)
    assert arrivals.replies(flower, [order], 1)[order].envelope().kind == "echo"


def test_a_site_that_is_not_admitted_is_told_the_servers_words_and_ends(superlink: Any, tmp_path: Path) -> None:
    stranger = Running(superlink, tmp_path, contracts.new_key()[0])
    assert stranger.process.wait(60) == 1
    assert stranger.said("TOLD refused None [code: ")
    assert stranger.said("Failed to activate SuperNode")
    assert not stranger.said("TOLD connected")


def test_a_site_that_is_stopped_is_offline_at_once(superlink: Any, tmp_path: Path) -> None:
    key, pem = contracts.new_key()
    number = superlink.control().RegisterNode(RegisterNodeRequest(public_key=pem, name="leaves")).node_id
    leaving = Running(superlink, tmp_path, key)
    contracts.wait_for(lambda: leaving.said("TOLD connected"), "the SuperNode")
    time.sleep(1)  # its call for orders is held
    leaving.process.send_signal(signal.SIGTERM)
    assert leaving.process.wait(5) == 0
    assert status(superlink, number) == "offline"


# --- one SuperNode in this process, whose server is a stand-in


@pytest.fixture
def message() -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    return to_messages({2: Envelope.of("join", {})}, ttl=60)[0]


@pytest.fixture
def context() -> Context:
    return Context(1, 2, {}, RecordDict(), {})


class Server:
    """A stand-in that has an order's parts, the root last, and keeps what is sent to it."""

    def __init__(self, parts: dict[str, bytes] | None = None) -> None:
        self.parts = parts
        self.sent: list[Message] = []

    def PullObject(self, request: Any) -> PullObjectResponse:
        if self.parts is None:
            raise RunNotRunningException
        content = self.parts.get(request.object_id)
        return PullObjectResponse(object_found=content is not None, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, _: Any) -> None:
        pass

    def PushMessages(self, request: Any) -> PushMessagesResponse:
        self.sent.extend(map(message_from_proto, request.messages_list))
        return PushMessagesResponse()


def at(server: Server, app: Any = None) -> supernode.SuperNode:
    """A SuperNode whose server is this one."""
    made = object.__new__(supernode.SuperNode)
    vars(made).update(
        _app=app or make_client_app(lambda order, _: order),
        _client=server,
        _node=Node(node_id=2),
        _retry=SimpleNamespace(invoke=lambda method, request: method(request)),
        _max_message_bytes=100 * 2**20,
    )
    return made


@pytest.mark.parametrize("parts", [lambda _: not_json(), lambda message: repeating(message, 300)])
def test_an_order_that_is_malformed_or_would_grow_is_answered_with_a_failure_and_not_read(
    message: Message, parts: Callable[[Message], dict[str, bytes]]
) -> None:
    server = Server(parts(message))
    assert server.parts is not None
    message.metadata.__dict__["_message_id"] = [*server.parts][-1]
    at(server)._carry_out(message, tree_of(server.parts))
    (reply,) = server.sent
    assert reply.error.reason == supernode.FAILED
    assert reply.metadata.reply_to_message_id == [*server.parts][-1]


@pytest.mark.parametrize("parts", [None, {}], ids=["its run has ended", "a part is lost"])
def test_an_order_that_cannot_be_fetched_is_dropped(message: Message, parts: dict[str, bytes] | None) -> None:
    server = Server(parts)
    message.metadata.__dict__["_message_id"] = message.object_id
    at(server)._carry_out(message, tree_of(not_json()))
    assert server.sent == []


def test_what_is_wrong_with_the_worker_is_told_at_the_site_alone(
    tmp_path: Path,
    message: Message,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(SITE_FOLDER, str(tmp_path))
    with worker_socket.listen(tmp_path):  # and no site.yaml: reading it fails, with its path
        refusal = Refusal.open(from_message(app(message, context)))
    assert refusal == Refusal(reason=WORKER_FAILED)
    assert str(tmp_path) in caplog.text


# --- the link


@pytest.fixture
def told() -> list[tuple[str, int | None, str]]:
    return []


@pytest.fixture
def link(told: list[tuple[str, int | None, str]]) -> supernode._Link:
    return supernode._Link(lambda *said: told.append(said))


def test_a_connection_is_told_of_when_it_is_made_lost_and_found(
    link: supernode._Link, told: list[tuple[str, int | None, str]]
) -> None:
    calls = link.watched(make_simple_http_retry_invoker())
    state = RetryState(target=print, args=(), kwargs={}, tries=2, elapsed_time=1.0, exception=OSError(), actual_wait=1)
    calls.on_backoff(state)
    calls.on_success(state)
    link.connected(42)
    calls.on_backoff(state)
    calls.on_backoff(state)
    calls.on_success(state)
    calls.on_success(state)
    assert told == [("connecting", None, ""), ("connected", 42, ""), ("connecting", 42, ""), ("connected", 42, "")]


@pytest.mark.parametrize(
    ("said", "gives_up"),
    [
        ("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol (_ssl.c:1006)", False),
        ("[Errno 104] Connection reset by peer", False),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate", True),
    ],
)
def test_a_line_that_breaks_in_a_handshake_is_dialled_again_and_a_false_certificate_is_not(
    link: supernode._Link, said: str, gives_up: bool
) -> None:
    assert link.watched(make_simple_http_retry_invoker()).should_giveup(httpx.ConnectError(said)) is gives_up


def test_an_answer_that_is_no_transports_fault_is_flowers_to_judge(link: supernode._Link) -> None:
    refused = httpx.Response(500, request=httpx.Request("POST", "http://server"))
    invoker = link.watched(make_simple_http_retry_invoker())
    assert invoker.should_giveup(httpx.HTTPStatusError("", request=refused.request, response=refused))


def test_a_note_that_cannot_be_written_stops_no_transfer(caplog: pytest.LogCaptureFixture) -> None:
    def full(*said: object) -> None:
        raise RunError("the disk is full")

    with caplog.at_level(logging.ERROR):
        supernode._Link(full).connected(42)
    assert "the disk is full" in caplog.text


def test_a_heartbeat_that_does_not_come_through_is_soon_sent_again() -> None:
    """Once the server's clock was an hour off for eight seconds, and the site was away for forty."""
    comes_through, waited = iter([True, False, False, False, False, False, False, False, True]), []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 9:
            raise StopIteration

    with pytest.raises(StopIteration):
        supernode.keep_beating(lambda: next(comes_through), wait)
    assert all(12 <= seconds <= 15 for seconds in (waited[0], waited[-1]))
    assert all(4 <= seconds <= 5 for seconds in waited[1:-1])
