"""The bodies of calls to a SuperLink, read within bounds before anything else sees them.

Sites' paths are told from the operator's here as well: what a caller may send goes by them.
"""

from __future__ import annotations

import asyncio

from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

HEALTH = "/health"
FLEET = "/v1/fleet/"
"""Where sites' calls begin."""

SMALL_BYTES = 64 * 2**10
"""The longest body of a caller that has proven nothing or starts a run, and the longest head and trailer."""

_GRACE_SECONDS = 20.0
_LEAST_BYTES_PER_SECOND = 32 * 2**10
"""The slowest that a body comes, on average, once the grace is over."""


class BodyTooLong(Exception):
    """A body has more bytes than its sender may send."""


async def read(receive: Receive, most: int) -> list[Message]:
    """The message that has a whole body, or says that its sender left.

    Raises BodyTooLong, and TimeoutError where the body comes more slowly than 32 KiB a second after 20 seconds.
    """
    body = bytearray()
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(_GRACE_SECONDS) as patience:
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return [message]
            body += message.get("body", b"")
            if len(body) > most:
                raise BodyTooLong
            if not message.get("more_body", False):
                return [{"type": "http.request", "body": bytes(body), "more_body": False}]
            patience.reschedule(began + _GRACE_SECONDS + len(body) / _LEAST_BYTES_PER_SECOND)


def again(read: list[Message], receive: Receive) -> Receive:
    """The channel as it was before something was read from it, which it then holds no longer."""

    async def receive_again() -> Message:
        return read.pop() if read else await receive()

    return receive_again


async def refuse(scope: Scope, receive: Receive, send: Send, status: int, reason: str) -> None:
    """Answer with `status`, and end the connection: what is left of the body is not waited for."""
    await PlainTextResponse(reason, status_code=status, headers={"connection": "close"})(scope, receive, send)
