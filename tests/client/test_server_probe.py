"""A site's look at a server: real TLS on loopback, with clocks and certificates that are right and wrong."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from client import server_probe
from client.server_probe import AHEAD_SECONDS, BEHIND_SECONDS, ServerProbe, probe_server
from security.certificates import create_authority, ends_soon, issue_server_certificate, last_day
from tests.contracts.leaning import leans

Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serve `/health` with a clock so many seconds off, and a certificate of so many days; returns HOST:PORT."""
    create_authority(tmp_path)
    servers: list[HTTPServer] = []

    def start(clock_off: float = 0.0, days: int = 400) -> str:
        class Health(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response_only(200)
                told = datetime.now(UTC) + timedelta(seconds=clock_off)
                self.send_header("Date", format_datetime(told, usegmt=True))
                self.end_headers()

        files = issue_server_certificate(tmp_path, ["127.0.0.1"], days=days)
        server = HTTPServer(("127.0.0.1", 0), Health)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_with_the_same_clock_needs_nobody(serve: Serve, tmp_path: Path) -> None:
    probe = probe_server(serve(), tmp_path / "ca.crt")
    assert list(probe.attention) == []
    assert probe.clock_ahead is not None
    assert abs(probe.clock_ahead) < 2
    assert probe.certificate_ends == last_day(tmp_path / "server.crt")


@pytest.mark.parametrize(("off", "said"), [(600, "600 s behind the server's"), (-60, "60 s ahead of the server's")])
def test_a_clock_that_keeps_a_site_out_is_told_with_what_to_do(
    serve: Serve, tmp_path: Path, off: float, said: str
) -> None:
    (what,) = probe_server(serve(clock_off=off), tmp_path / "ca.crt").attention
    assert abs(int(what.split()[4]) - abs(off)) <= 1
    assert said.split(" ", 1)[1] in what
    assert "timedatectl" in what


def test_a_certificate_that_ends_soon_is_told_with_its_last_day(serve: Serve, tmp_path: Path) -> None:
    (what,) = probe_server(serve(days=9), tmp_path / "ca.crt").attention
    assert str(last_day(tmp_path / "server.crt")) in what


def test_why_a_server_cannot_be_reached_is_told(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        probe = probe_server(f"127.0.0.1:{closed.getsockname()[1]}", tmp_path / "ca.crt")
    assert list(probe.attention) == ["the server cannot be reached: Connection refused"]
    monkeypatch.setattr(server_probe, "_PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        probe = probe_server(f"127.0.0.1:{silent.getsockname()[1]}", tmp_path / "ca.crt")
        assert time.monotonic() - began < 3
    assert "no answer within 0.3 s" in str(probe.failure)
    other = tmp_path / "other"
    create_authority(other)
    probe = probe_server(serve(), other / "ca.crt")
    assert probe.distrusted
    assert "does not vouch for" in next(probe.attention)


def test_an_expired_certificate_asks_after_the_clock(serve: Serve, tmp_path: Path) -> None:
    probe = probe_server(serve(days=0), tmp_path / "ca.crt")
    assert probe.distrusted
    assert "is this machine's clock right?" in str(probe.failure)


def test_the_last_days_of_a_certificate_are_told(tmp_path: Path) -> None:
    create_authority(tmp_path, days=40)
    last = last_day(tmp_path / "ca.crt")
    assert ends_soon(tmp_path / "ca.crt") is None
    assert f"ends on {last}, in 30 days" in str(ends_soon(tmp_path / "ca.crt", last - timedelta(days=30)))
    assert f"ended on {last}" in str(ends_soon(tmp_path / "ca.crt", last + timedelta(days=1)))


def test_a_clock_within_what_flower_takes_is_not_told() -> None:
    assert ServerProbe(clock_ahead=AHEAD_SECONDS - 1).clock_note is None
    assert ServerProbe(clock_ahead=-BEHIND_SECONDS + 1).clock_note is None
    assert ServerProbe(clock_ahead=AHEAD_SECONDS + 2).clock_note is not None
    assert ServerProbe(clock_ahead=-BEHIND_SECONDS - 1).clock_note is not None


@leans("client/server_probe.py")
def test_flower_takes_messages_from_clocks_so_far_apart() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert (AHEAD_SECONDS, BEHIND_SECONDS) == (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE)
