"""uvicorn's HTTP with bounds on what comes before a body: it would keep headers, trailers and requests without end."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flower_transport.bodies import SMALL_BYTES

_ENDS_WITHIN = 1.0
"""Seconds that a connection that is being closed has left, for its answer to be read."""


class BoundedHttp(HttpToolsProtocol):
    """One connection. It ends when a head is too long, or requests pile up behind one that is not answered yet."""

    _unread = 0
    """The bytes received since the last that were whole headers or part of a body."""

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > SMALL_BYTES and not self.transport.is_closing():
            self.send_400_response("the head of this request is too long")

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self._end_soon()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._end_soon()

    def _end_soon(self) -> None:
        # TLS would wait for the other side's farewell, and take whatever it sends meanwhile.
        self.loop.call_later(_ENDS_WITHIN, self.transport.abort)

    def on_message_begin(self) -> None:
        # One may wait: an answer can be whole at the client a moment before it has ended here.
        if self.pipeline:
            raise ValueError("requests that pile up")  # the parser stops, and uvicorn answers 400
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()
