"""A line between two parties, through which all bytes of their connections pass, and on which things go wrong."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress

_MOST_REPLAYED = 1 << 20
_RESET = struct.pack("ii", 1, 0)


class Line:
    """HOST:PORT at `address`, behind which `target` answers. Knows nothing of what passes: it is under TLS."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._flows = threading.Event()
        self._flows.set()
        self._is_cut = False
        self._loses_answers = False
        self._connections: set[_Connection] = set()
        self.replayed = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        """Reset all connections, and each new one, until the line is mended."""
        self._is_cut = True
        for connection in list(self._connections):
            connection.reset()

    def hold(self) -> None:
        """Let no byte through, in either direction, until the line is mended; then all of them."""
        self._flows.clear()

    def double(self) -> None:
        """Have all that is asked until the line is mended asked twice.

        What was sent on the connections there are is sent again, byte for byte, on others. And each answer is lost with
        its connection, after the other end has acted: so who asked asks again.
        """
        sent = [bytes(connection.sent) for connection in self._connections]
        self._loses_answers = True
        for content in sent:
            with suppress(OSError), socket.create_connection(self._target, timeout=5) as again:
                again.sendall(content)
                self.replayed += 1

    def mend(self) -> None:
        self._is_cut = self._loses_answers = False
        self._flows.set()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _serve(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                inside, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(inside,), daemon=True).start()

    def _connect(self, inside: socket.socket) -> None:
        try:
            outside = socket.create_connection(self._target)
        except OSError:
            inside.close()
            return
        connection = _Connection(inside, outside)
        self._connections.add(connection)
        if self._is_cut:
            connection.reset()
        answers = threading.Thread(target=self._carry, args=(connection, outside, inside), daemon=True)
        answers.start()
        self._carry(connection, inside, outside)
        answers.join()
        self._connections.discard(connection)
        connection.close()

    def _carry(self, connection: _Connection, source: socket.socket, drain: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(65536):
                self._flows.wait()
                if source is connection.inside:
                    connection.sent += part[: _MOST_REPLAYED - len(connection.sent)]
                elif self._loses_answers:
                    connection.reset()
                    return
                drain.sendall(part)
            if not connection.is_reset:
                drain.shutdown(socket.SHUT_WR)


class _Connection:
    """Two ends, and what the one inside has sent so far."""

    def __init__(self, inside: socket.socket, outside: socket.socket) -> None:
        self.inside = inside
        self.outside = outside
        self.sent = bytearray()
        self.is_reset = False

    def reset(self) -> None:
        """End it as a broken line does: without a word to either end."""
        self.is_reset = True
        for end in (self.inside, self.outside):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RD)  # wakes who reads
            with suppress(OSError):
                end.close()

    def close(self) -> None:
        for end in (self.inside, self.outside):
            end.close()
