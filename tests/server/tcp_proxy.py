"""A proxy that carries bytes from one port of this machine to another, as anybody with an account here can run."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def tcp_proxy(target: tuple[str, int]) -> Iterator[str]:
    """HOST:PORT of a proxy to `target`, as long as the context lasts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_serve, args=(listener, target), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def _serve(listener: socket.socket, target: tuple[str, int]) -> None:
    with suppress(OSError):  # the listener is closed
        while True:
            inside, _ = listener.accept()
            outside = socket.create_connection(target)
            for ends in ((inside, outside), (outside, inside)):
                threading.Thread(target=_carry, args=ends, daemon=True).start()


def _carry(source: socket.socket, drain: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(65536):
            drain.sendall(part)
        drain.shutdown(socket.SHUT_WR)
