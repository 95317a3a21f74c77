"""The wish of a caller to be answered later rather than with nothing: `Prefer: wait=SECONDS` (RFC 7240)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

MOST_SECONDS = 20
"""The longest that a call is held: shorter than Flower's clients wait for an answer, and than idle connections last."""

PREFER = "prefer"
WAIT = "wait="


class PrefersToWait:
    """A client's interceptor that has one kind of call held for up to `seconds`."""

    def __init__(self, method: str, seconds: float = MOST_SECONDS) -> None:
        self._method = f"/{method}"
        self.seconds = seconds

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        if context.rpc_method.endswith(self._method) and self.seconds > 0:
            context.request.headers[PREFER] = f"{WAIT}{math.ceil(self.seconds)}"
        response: httpx.Response = call_next(context)
        return response
