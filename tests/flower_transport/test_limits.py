"""What strangers, sites and the operator can make a SuperLink hold: over TLS, against its real HTTP and middleware."""

import asyncio
import socket
import ssl
import threading
import time
from base64 import b64encode
from contextlib import suppress
from http.client import HTTPResponse
from types import SimpleNamespace

import psutil
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import sign_message
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from flower_transport import bodies, limits
from flower_transport.bodies import SMALL_BYTES
from flower_transport.bounded_http import BoundedHttp
from flower_transport.limits import LARGE_BYTES, BodyLimits
from security.certificates import create_authority, issue_server_certificate
from security.connection_watch import ConnectionLimits, ConnectionWatch

PUSH = "/v1/fleet/push-object"
CONTROL = "/v1/control/list-runs"


class Site:
    """A site's key, and the headers by which Flower's client proves it."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP384R1())
        self.public_key = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def headers(self, signed=None):
        signed = signed or now().isoformat()
        signature = sign_message(self.key, signed.encode())
        return {
            "flwr-public-key": b64encode(self.public_key).decode(),
            "flwr-signature": b64encode(signature).decode(),
            "flwr-timestamp": signed,
        }


SITE, UNKNOWN = Site(), Site()
KNOWN = [SITE.public_key]


class Keys:
    def get_node_id_by_public_key(self, public_key):
        return KNOWN.index(public_key) + 1 if public_key in KNOWN else None


async def answer(request: Request):
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("superlink")
    create_authority(folder)
    issue_server_certificate(folder, ["127.0.0.1"])
    app = Starlette(routes=[Route(path, answer, methods=["POST", "GET"]) for path in (PUSH, CONTROL, "/health")])
    app.state.linkstate_factory = SimpleNamespace(state=Keys)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        watch = ConnectionWatch(number, ConnectionLimits(proves_within=2, unproven_by_host=8))
        watch.start()
        app.add_middleware(BodyLimits, watch=watch)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                ssl_certfile=folder / "server.crt",
                ssl_keyfile=folder / "server.key",
                http=BoundedHttp,
                ws="none",
                log_level="critical",
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield number
        server.should_exit = server.force_exit = True
        thread.join(10)
        watch.stop()


def connect(port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = context.wrap_socket(socket.create_connection(("127.0.0.1", port)))
    connection.settimeout(20)
    return connection


def head(path, **headers):
    lines = [
        f"POST {path} HTTP/1.1",
        "host: x",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def status(connection):
    """The status of the answer, and its text."""
    answer = HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.read().decode()


def send_all_that_goes(connection, parts):
    """Send `parts` until the other side has ended the connection."""
    with suppress(OSError):
        for part in parts:
            connection.sendall(part)


def is_ended_within(connection, seconds):
    deadline = time.monotonic() + seconds
    with suppress(ConnectionError, ssl.SSLError):
        while time.monotonic() < deadline:
            connection.settimeout(deadline - time.monotonic())
            if connection.recv(65536) == b"":
                return True
        return False
    return True


@pytest.mark.parametrize(
    "proof", [{}, UNKNOWN.headers(), SITE.headers("2020-01-01T00:00:00+00:00"), {"flwr-public-key": "?"}]
)
@pytest.mark.parametrize("path", [PUSH, "/health"])
def test_a_stranger_is_refused_before_its_body_is_read(port, path, proof):
    with connect(port) as connection:
        connection.sendall(head(path, content_length=600_000_000, **proof))
        assert status(connection)[0] == 413


@pytest.mark.parametrize("path", [PUSH, "/health"])
def test_a_body_of_untold_length_ends_where_a_stranger_may_send_no_more(port, path):
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    with connect(port) as connection:
        send_all_that_goes(connection, [head(path, transfer_encoding="chunked"), *[chunk] * 100])
        assert status(connection)[0] == 413
        assert is_ended_within(connection, 3)


def test_four_strangers_with_600_mb_each_take_no_memory_and_are_cut_off(port):
    process = psutil.Process()
    before, part = process.memory_info().rss, bytes(1 << 20)

    def stranger():
        with connect(port) as connection:
            connection.sendall(head(PUSH, content_length=600_000_000))
            send_all_that_goes(connection, [part] * 600)

    threads = [threading.Thread(target=stranger) for _ in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert process.memory_info().rss - before < 50_000_000
    assert time.monotonic() - began < 10


def test_an_admitted_site_sends_a_chunk_of_a_state_and_no_more(port):
    with connect(port) as connection:
        connection.sendall(head(PUSH, content_length=20_000_000, **SITE.headers()) + bytes(20_000_000))
        assert status(connection) == (200, "20000000")
    with connect(port) as connection:
        connection.sendall(head(PUSH, content_length=LARGE_BYTES + 1, **SITE.headers()))
        assert status(connection)[0] == 413


def test_a_short_body_of_anybody_is_flowers_to_judge(port):
    with connect(port) as connection:
        connection.sendall(head(PUSH, content_length=SMALL_BYTES) + bytes(SMALL_BYTES))
        assert status(connection) == (200, str(SMALL_BYTES))


def test_a_long_body_is_taken_from_the_operator(port):
    with connect(port) as connection:
        connection.sendall(head(CONTROL, content_length=1_000_000) + bytes(1_000_000))
        assert status(connection) == (200, "1000000")


@pytest.mark.parametrize(
    "start", [head(PUSH)[:-2] + b"x: ", head(PUSH, transfer_encoding="chunked") + b"0\r\nx: ", b"GET /"]
)
def test_a_head_without_an_end_is_cut_off(port, start):
    with connect(port) as connection:
        send_all_that_goes(connection, [start, *[b"a" * 4096] * 100])
        assert status(connection)[0] == 400
        assert is_ended_within(connection, 3)


def test_requests_do_not_pile_up_behind_an_unanswered_one(port):
    with connect(port) as connection:
        connection.sendall(head(PUSH) * 3)
        assert status(connection)[0] == 400


def test_who_proves_nothing_is_let_go_and_an_admitted_site_keeps_its_connection(port):
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    with connect(port) as site, connect(port) as slow:
        slow.sendall(head(PUSH, content_length=10)[:-2])
        for _ in range(3):
            site.sendall(head(PUSH, content_length=1, **SITE.headers()) + b"x")
            assert status(site) == (200, "1")
            time.sleep(1.2)
        assert slow.recv(1) == b""
        for connection in silent:
            connection.settimeout(0.1)
            assert connection.recv(1) == b""
            connection.close()


def dribble(port, site, begun, ends):
    """A call of a site that announces 1 MB and sends a byte now and then."""
    with connect(port) as connection, suppress(OSError):
        connection.sendall(head(PUSH, content_length=1_000_000, **site.headers()))
        begun.release()
        while not ends.wait(0.2):
            connection.sendall(b"x")


@pytest.fixture
def dribbling(port):
    """Four sites, each of which dribbles four calls: every turn there is."""
    begun, ends, before = threading.Semaphore(0), threading.Event(), list(KNOWN)
    sites = [Site() for _ in range(4)]
    KNOWN.extend(site.public_key for site in sites)
    threads = [threading.Thread(target=dribble, args=(port, site, begun, ends)) for site in sites * 4]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=20)
    time.sleep(2)
    yield
    ends.set()
    for thread in threads:
        thread.join(20)
    KNOWN[:] = before


def test_sites_that_dribble_hold_up_no_call_of_the_operators(port, dribbling):
    with connect(port) as connection:
        connection.settimeout(3)
        connection.sendall(head(CONTROL, content_length=1_000_000) + bytes(1_000_000))
        assert status(connection) == (200, "1000000")


def test_who_dribbles_is_cut_off_and_leaves_its_turn(port, monkeypatch, request):
    monkeypatch.setattr(bodies, "_GRACE_SECONDS", 3.0)
    request.getfixturevalue("dribbling")
    with connect(port) as connection:
        connection.sendall(head(PUSH, content_length=1_000_000, **SITE.headers()) + bytes(1_000_000))
        assert status(connection) == (200, "1000000")


def test_waiting_for_a_turn_counts_in_the_time(port, monkeypatch, dribbling):
    monkeypatch.setattr(limits, "_LARGE_WITHIN", 1.0)
    with connect(port) as connection:
        connection.sendall(head(PUSH, content_length=1_000_000, **SITE.headers()) + bytes(1_000_000))
        assert status(connection)[0] == 408


def test_a_turn_lasts_until_the_call_is_answered():
    """The app holds the body: no more calls of one caller are in it at once than may be read at once."""
    inside, most = 0, 0

    async def app(scope, receive, send):
        nonlocal inside, most
        await receive()
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.05)
        inside -= 1

    async def call(middleware):
        async def receive():
            return {"type": "http.request", "body": bytes(100_000), "more_body": False}

        scope = {
            "type": "http",
            "path": CONTROL,
            "client": ("127.0.0.1", 1),
            "headers": [(b"content-length", b"100000")],
        }
        await middleware(scope, receive, None)

    async def all_at_once():
        middleware = BodyLimits(app, ConnectionWatch(1))
        await asyncio.gather(*[call(middleware) for _ in range(12)])

    asyncio.run(all_at_once())
    assert most == 4
