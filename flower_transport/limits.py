"""The bounds on what a caller can make the SuperLink hold in memory, by what it has proven before its body is read.

Flower reads the whole body of a call and only then looks at who sent it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flower_transport.site_proof import proven_site
from security.connection_watch import ConnectionWatch

SMALL_BYTES = 64 * 2**10
"""The longest body of a caller that has proven nothing."""

LARGE_BYTES = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 32 * 2**20
"""The longest body of an admitted site or the operator: states come in chunks, a message's fields in one piece."""

FLEET = "/v1/fleet/"
HEALTH = "/health"
_SMALL_WITHIN = 10.0
_LARGE_WITHIN = 300.0
"""Seconds in which a body has to be here."""

_LARGE_AT_ONCE = 16
_LARGE_AT_ONCE_BY_CALLER = 4
_OPERATOR = "operator"


class BodyTooLong(Exception):
    """A body has more bytes than its sender may send."""


class BodyLimits:
    """ASGI middleware: reads bodies within bounds, the longer ones a few at a time, and tells the watch who is proven.

    Stands behind whatever admits the operator's calls: what arrives here for other paths than the sites' is proven.
    """

    def __init__(self, app: ASGIApp, watch: ConnectionWatch) -> None:
        self._app = app
        self._watch = watch
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._large_by_caller: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_LARGE_AT_ONCE_BY_CALLER)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._body(scope, receive)
        except BodyTooLong:
            await _refuse(scope, receive, send, 413, "the body of this call is too long")
        except TimeoutError:
            await _refuse(scope, receive, send, 408, "the body of this call did not come in time")
        else:
            await self._app(scope, _again(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> list[Message]:
        """The message that has the call's body. Raises BodyTooLong, and TimeoutError when it does not come."""
        announced = _announced(Headers(scope=scope))
        is_large = announced is None or announced > SMALL_BYTES
        caller = await self._caller(scope, is_large=is_large)
        if caller is None or not is_large:
            async with asyncio.timeout(_SMALL_WITHIN):
                return await _read(receive, announced, SMALL_BYTES)
        async with self._turn(caller), asyncio.timeout(_LARGE_WITHIN):
            return await _read(receive, announced, LARGE_BYTES)

    async def _caller(self, scope: Scope, *, is_large: bool) -> str | None:
        """Who calls, where that is proven. A signature is checked once a connection, and again for a long body."""
        if scope["path"].startswith(HEALTH):
            return None
        if not scope["path"].startswith(FLEET):
            self._watch.prove(scope["client"])
            return _OPERATOR
        if not is_large and self._watch.is_proven(scope["client"]):
            return None  # a short body needs no more
        known = scope["app"].state.linkstate_factory.state
        site = await run_in_threadpool(lambda: proven_site(Headers(scope=scope), known()))
        if site is not None:
            self._watch.prove(scope["client"], site)
        return site

    @asynccontextmanager
    async def _turn(self, caller: str) -> AsyncIterator[None]:
        async with self._large_by_caller[caller], self._large:
            yield


def _announced(headers: Headers) -> int | None:
    """The bytes that a body is to have; None where that is not told, as in a chunked one."""
    if "transfer-encoding" in headers:
        return None
    length = headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else None


async def _read(receive: Receive, announced: int | None, most: int) -> list[Message]:
    if announced is not None and announced > most:
        raise BodyTooLong
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return [message]
        body += message.get("body", b"")
        if len(body) > most:
            raise BodyTooLong
        if not message.get("more_body", False):
            return [{"type": "http.request", "body": bytes(body), "more_body": False}]


def _again(read: list[Message], receive: Receive) -> Receive:
    """The channel as it was before something was read from it, which it then holds no longer."""

    async def receive_again() -> Message:
        return read.pop() if read else await receive()

    return receive_again


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, reason: str) -> None:
    # What is left of the body is not waited for.
    await PlainTextResponse(reason, status_code=status, headers={"connection": "close"})(scope, receive, send)
