"""Calls that are answered when there is something to answer: in place of asking again and again.

Flower's processes ask each other every few seconds, or several times a second, whether there is something for them. A
call that says `Prefer: wait=SECONDS` (RFC 7240) is held here until a bell rings for it, or the time is over.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection, Hashable, Mapping

import uvicorn
from google.protobuf.message import DecodeError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flower_transport.bells import Bells
from flower_transport.bodies import again, read
from flower_transport.limits import LARGE_BYTES
from flower_transport.waiting import MOST_SECONDS, PREFER, WAIT

Keys = Callable[[bytes], Collection[Hashable]]
"""What a call listens for, from its body. May raise protobuf's DecodeError."""


class HeldCalls:
    """ASGI middleware: holds the calls to the paths in `keys`, of those who may be held.

    Stands behind whatever bounds bodies and admits callers. A caller that leaves meanwhile is not answered: what it
    would be told is there for whoever asks next.
    """

    def __init__(
        self,
        app: ASGIApp,
        bells: Bells,
        keys: Mapping[str, Keys],
        may_wait: Callable[[Scope], bool],
    ) -> None:
        self._app = app
        self._bells = bells
        self._keys = keys
        self._may_wait = may_wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keys = self._keys.get(scope["path"]) if scope["type"] == "http" else None
        seconds = _wanted(scope) if keys is not None and self._may_wait(scope) else 0
        if keys is None or not seconds:
            await self._app(scope, receive, send)
            return
        body = await read(receive, LARGE_BYTES)
        if await self._hold(keys, body[0], receive, seconds):
            await self._app(scope, again(body, receive), send)

    async def _hold(self, keys: Keys, body: Message, receive: Receive, seconds: int) -> bool:
        """Wait until it is time to answer. Returns whether the caller is still there."""
        try:
            listening = asyncio.ensure_future(self._bells.listen(keys(body.get("body", b""))))
        except DecodeError:
            return True  # Flower says what is wrong with it
        leaving = asyncio.ensure_future(receive())
        try:
            done, _ = await asyncio.wait({listening, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listening.cancel()
            leaving.cancel()
        return leaving not in done


def _wanted(scope: Scope) -> int:
    """The whole seconds for which a call would rather wait than be answered with nothing."""
    for name, value in scope["headers"]:
        if name == PREFER.encode():
            _, _, wanted = value.decode("latin-1").partition(WAIT)
            return min(int(wanted), MOST_SECONDS) if wanted.isascii() and wanted.isdigit() and len(wanted) < 4 else 0
    return 0


class HoldingServer(uvicorn.Server):
    """uvicorn's, which has the calls answered that are held before it waits for all to be answered."""

    def __init__(self, config: uvicorn.Config, bells: Bells) -> None:
        super().__init__(config)
        self._bells = bells

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._bells.let_go()
        await super().shutdown(sockets)
