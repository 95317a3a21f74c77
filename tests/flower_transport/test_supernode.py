"""What a SuperNode of ours tells of its connection, and what it does with an order whose run has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.supercore.exit import ExitCode
from flwr.supercore.retry import RetryState
from flwr.supernode import fleet_http_connection, start_client_internal

from core_training.foundation.errors import RunError
from flower_transport import supernode

ELSEWHERE = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture
def told() -> list[tuple[str, int | None, str]]:
    return []


@pytest.fixture
def link(told: list[tuple[str, int | None, str]], monkeypatch: pytest.MonkeyPatch) -> supernode._Link:
    @contextmanager
    def connect(*given: Any, **named: Any) -> Iterator[tuple[int, str]]:
        yield 42, "callbacks"

    def leave(code: int, message: str | None = None) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(start_client_internal, "_init_connection", connect)
    monkeypatch.setattr(fleet_http_connection, "flwr_exit", leave)
    return supernode._Link(lambda *said: told.append(said))


def test_a_connection_is_told_of_when_it_is_made_lost_and_found(
    link: supernode._Link, told: list[tuple[str, int | None, str]]
) -> None:
    calls = link.retry_invoker()
    state = RetryState(target=print, args=(), kwargs={}, tries=2, elapsed_time=1.0, exception=OSError(), actual_wait=1)
    calls.on_backoff(state)
    with link.connection() as connection:
        assert connection == (42, "callbacks")
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
    assert link.retry_invoker().should_giveup(httpx.ConnectError(said)) is gives_up


def test_an_answer_that_is_no_transports_fault_is_flowers_to_judge(link: supernode._Link) -> None:
    refused = httpx.Response(500, request=httpx.Request("POST", "http://server"))
    assert link.retry_invoker().should_giveup(httpx.HTTPStatusError("", request=refused.request, response=refused))


@pytest.mark.parametrize("part", ["loop", "heartbeat"])
def test_a_process_in_which_flower_gives_up_ends(tmp_path: Path, part: str) -> None:
    """Flower's own would stay, and serve its messenger for ever without asking for an order, or without a pulse."""
    code = f"""
import socket, threading, time
from flwr.supercore.exit.signal_handler import register_signal_handlers
from flwr.supercore.telemetry import EventType
from flwr.supernode import fleet_http_connection
from flower_transport import supernode

def flower():
    register_signal_handlers(event_type=EventType.RUN_SUPERNODE_LEAVE, exit_message="gone", grpc_servers=[])
    threading.Thread(target=time.sleep, args=(600,)).start()
    if {part!r} == "heartbeat":
        def fails():
            raise RuntimeError("500")
        fleet_http_connection.HeartbeatSender(fails).start()
        time.sleep(600)

supernode.flower_supernode = flower
supernode.run(lambda *said: None, socket.socket())
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60, env=ELSEWHERE).returncode == 0


def test_a_refusal_is_told_with_the_servers_words(
    link: supernode._Link, told: list[tuple[str, int | None, str]]
) -> None:
    with pytest.raises(SystemExit):
        link.exit(ExitCode.SUPERNODE_CONNECTION_ERROR, "Failed to initialize the connection.\n[code: 7] no such key\nx")
    assert told[-1] == ("refused", None, "[code: 7] no such key")


@pytest.mark.parametrize(("run", "came", "ends"), [(None, None, False), (None, "order", True), (7, "order", False)])
def test_an_order_that_is_left_over_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, run: int | None, came: str | None, ends: bool
) -> None:
    """Flower would keep it, and from then on every answer would be one order late."""

    def pull(*, receive: Callable[[], str | None]) -> int | None:
        assert receive() == came
        return run

    monkeypatch.setattr(supernode, "_PULL", pull)
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda process, number: signals.append((process, number)))
    assert supernode._pull_and_store_message(receive=lambda: came) == run
    assert signals == ([(os.getpid(), signal.SIGTERM)] if ends else [])


def test_a_note_that_cannot_be_written_stops_no_transfer(
    link: supernode._Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*said: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(link, "_note", full)
    with link.connection() as connection:
        assert connection == (42, "callbacks")


def test_a_process_that_ends_itself_is_gone_though_threads_serve_others(tmp_path: Path) -> None:
    """As Flower's, whose interface for the messenger is served by a thread that Python waits for."""
    code = """
import threading, time
from flwr.supercore.exit.signal_handler import register_signal_handlers
from flwr.supercore.telemetry import EventType
from flower_transport import supernode
register_signal_handlers(event_type=EventType.RUN_SUPERNODE_LEAVE, exit_message="gone", grpc_servers=[])
threading.Thread(target=time.sleep, args=(600,)).start()
supernode._PULL = lambda *, receive: receive() and None
supernode._pull_and_store_message(receive=lambda: "order")
time.sleep(600)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60, env=ELSEWHERE).returncode == 0


def test_pauses_are_short_while_a_run_goes_on_and_flowers_own_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [0.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", slept.append)
    pauses = supernode._Pauses()
    for now[0] in (0.0, 10.0, 1000.0):
        pauses.sleep(supernode.FLOWERS_PAUSE)
    assert slept == [supernode.LEAST_PAUSE, 1.0, supernode.FLOWERS_PAUSE]
