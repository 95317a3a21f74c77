"""The bounds on what a caller can make the SuperLink hold in memory, by what it has proven before its body is read.

Flower reads the whole body of a call and only then looks at who sent it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack

from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flower_transport.bodies import FLEET, HEALTH, SMALL_BYTES, BodyTooLong, again, read, refuse
from flower_transport.site_proof import proven_site
from security.connection_watch import ConnectionWatch

LARGE_BYTES = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 32 * 2**20
"""The longest body of an admitted site or the operator: states come in chunks, a message's fields in one piece."""

_SMALL_WITHIN = 10.0
_LARGE_WITHIN = 300.0
"""Seconds in which a body has to be here, with all that it waits for."""

_LARGE_AT_ONCE = 16
_LARGE_AT_ONCE_BY_CALLER = 4
_OPERATOR = "operator"


class BodyLimits:
    """ASGI middleware: reads bodies within bounds, the longer ones a few at a time, and tells the watch who is proven.

    A long body's turn lasts until Flower has answered the call, since Flower holds the body until then. The operator's
    calls take turns of their own: no site can hold them up.

    Stands behind whatever admits the operator's calls: what arrives here for other paths than the sites' is proven.
    """

    def __init__(self, app: ASGIApp, watch: ConnectionWatch) -> None:
        self._app = app
        self._watch = watch
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._large_by_caller: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_LARGE_AT_ONCE_BY_CALLER)
        )
        """Those of each site, and the operator's."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        async with AsyncExitStack() as turn:
            try:
                body = await self._body(scope, receive, turn)
            except BodyTooLong:
                await refuse(scope, receive, send, 413, "the body of this call is too long")
            except TimeoutError:
                await refuse(scope, receive, send, 408, "the body of this call did not come in time")
            else:
                await self._app(scope, again(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive, turn: AsyncExitStack) -> list[Message]:
        """The message that has the call's body, which keeps `turn` where it is long.

        Raises BodyTooLong, and TimeoutError when it does not come.
        """
        announced = _announced(Headers(scope=scope))
        is_large = announced is None or announced > SMALL_BYTES
        caller = await self._caller(scope, is_large=is_large)
        if caller is None or not is_large:
            async with asyncio.timeout(_SMALL_WITHIN):
                return await _read(receive, announced, SMALL_BYTES)
        async with asyncio.timeout(_LARGE_WITHIN):
            await self._wait_for_turn(caller, turn)
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

    async def _wait_for_turn(self, caller: str, turn: AsyncExitStack) -> None:
        await turn.enter_async_context(self._large_by_caller[caller])
        if caller != _OPERATOR:
            await turn.enter_async_context(self._large)


def _announced(headers: Headers) -> int | None:
    """The bytes that a body is to have; None where that is not told, as in a chunked one."""
    if "transfer-encoding" in headers:
        return None
    length = headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else None


async def _read(receive: Receive, announced: int | None, most: int) -> list[Message]:
    if announced is not None and announced > most:
        raise BodyTooLong
    return await read(receive, most)
