"""Flower's SuperNode, which reports its standing with the server, and asks for orders more often while a run goes on.

It ends where Flower's would live on and do nothing: whoever looks after it starts another.

It serves the messenger on a socket that it was given, bound already, and opens no port.

Flower pauses for three seconds whenever there is no order, and every exchange of a round waits for that; a secure round
has one exchange more than a plain one. Here the pause is a tenth of the time since the last order, so that a round
under way is hardly held up, and a server with many idle sites is asked no more than before.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from logging import ERROR, WARNING
from types import SimpleNamespace
from typing import Any, Literal, NoReturn

import httpx
import uvicorn
from flwr.supercore import log
from flwr.supercore.exit import ExitCode
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli import flower_supernode

from core_training.foundation.errors import FedloomError

LEAST_PAUSE = 0.2
FLOWERS_PAUSE = 3

Standing = Literal["connecting", "connected", "refused"]
Note = Callable[[Standing, int | None, str], object]
"""A listener to the node's standing with the server, its number if known, the reason of a refusal."""


class _Pauses:
    """A stand-in for `time.sleep` in Flower's loop, which sleeps shorter than `FLOWERS_PAUSE` while it has an order."""

    def __init__(self) -> None:
        self._last_order = time.monotonic()

    def sleep(self, seconds: float) -> None:
        if seconds < FLOWERS_PAUSE:
            self._last_order = time.monotonic()
        waited = time.monotonic() - self._last_order
        time.sleep(min(seconds, max(LEAST_PAUSE, waited / 10)))


class _Link:
    """A follower of the connection where Flower makes, loses and gives it up."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._lock = threading.Lock()
        self._node: int | None = None
        self._stands: Standing | None = None
        self._connect = start_client_internal._init_connection
        self._make_invoker = fleet_http_connection.make_simple_http_retry_invoker
        self._exit = fleet_http_connection.flwr_exit
        self._tell("connecting")

    @contextmanager
    def connection(self, *given: Any, **named: Any) -> Iterator[Any]:
        with self._connect(*given, **named) as connection:
            self._node = connection[0]
            self._tell("connected")
            yield connection

    def retry_invoker(self) -> Any:
        """Flower's own, which says when a call has to be repeated, and when one came through.

        It gives up over a certificate that is not to be trusted, and not over every error in which TLS is named: a
        line that breaks, or a server that is killed, in the middle of a handshake is one, too.
        """
        invoker = self._make_invoker()
        gives_up = invoker.should_giveup
        invoker.should_giveup = lambda error: not _is_of_the_line(error) and gives_up(error)
        failed, came_through = invoker.on_backoff, invoker.on_success

        def on_backoff(state: Any) -> None:
            self._tell("connecting")
            failed(state)

        def on_success(state: Any) -> None:
            if self._node is not None:
                self._tell("connected")
            came_through(state)

        invoker.on_backoff, invoker.on_success = on_backoff, on_success
        return invoker

    def exit(self, code: int, message: str | None = None, **named: Any) -> NoReturn:
        if code == ExitCode.SUPERNODE_CONNECTION_ERROR:
            self._tell("refused", (message or "").partition("\n")[2].partition("\n")[0])
        self._exit(code, message, **named)
        raise SystemExit(1)

    def _tell(self, stands: Standing, detail: str = "") -> None:
        """Report from several threads, whose transfers must not fail because this cannot be written."""
        with self._lock:
            if stands != self._stands:
                self._stands = stands
                try:
                    self._note(stands, self._node, detail)
                except (FedloomError, OSError) as error:
                    log(ERROR, "how the link stands could not be noted: %s", error)


def _pull_and_store_message(*, receive: Callable[[], Any], **named: Any) -> int | None:
    """Flower's own; but an order that came and could not be fetched, as when its run ends, ends the SuperNode.

    It may keep the order all the same, and from then on every answer would wait until the next order has come.
    """
    received = []

    def noted() -> Any:
        if (order := receive()) is not None:
            received.append(order)
        return order

    run: int | None = _PULL(receive=noted, **named)
    if run is None and received:
        _end("an order was left over when its run ended")
    return run


def _heartbeat(beat: Callable[[], bool]) -> Any:
    """Flower's own; but one that fails for good ends the SuperNode, which else the server would take for gone."""

    def beat_or_end() -> bool:
        try:
            return beat()
        except Exception as error:
            _end(f"the server does not take this site's heartbeat ({error})")
            raise

    return HeartbeatSender(beat_or_end)


def _end(reason: str) -> None:
    log(WARNING, "%s: this SuperNode ends, to be started anew", reason)
    os.kill(os.getpid(), signal.SIGTERM)  # Flower's own way out, past its thread that serves the messenger


def _is_of_the_line(error: Exception) -> bool:
    return isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower()


_PULL = start_client_internal._pull_and_store_message
_COMMAND: Any = import_module("flwr.supernode.cli.flower_supernode")


def _server_on(listener: socket.socket) -> type[uvicorn.Server]:
    """Flower's choice of a server for the messenger, which serves `listener` whatever address it was made for."""

    class ServerOnListener(uvicorn.Server):
        def run(self, sockets: list[socket.socket] | None = None) -> None:
            super().run([listener])

    return ServerOnListener


def run(note: Note, listener: socket.socket) -> None:
    """Run the SuperNode that the command line describes, as `flower-supernode` does, until it is stopped.

    Whoever can connect to `listener`, and knows the secret that the command line names, is its messenger.
    """
    link = _Link(note)
    _COMMAND.uvicorn = SimpleNamespace(**{**vars(uvicorn), "Server": _server_on(listener)})
    start_client_internal.time = SimpleNamespace(**{**vars(time), "sleep": _Pauses().sleep})
    start_client_internal._init_connection = link.connection
    start_client_internal._pull_and_store_message = _pull_and_store_message
    fleet_http_connection.make_simple_http_retry_invoker = link.retry_invoker
    fleet_http_connection.flwr_exit = link.exit
    fleet_http_connection.HeartbeatSender = _heartbeat
    flower_supernode()
    # Flower's loop has ended over an answer that it did not expect; it says which, and leaves the process there.
    _end("Flower asks for no more orders")
