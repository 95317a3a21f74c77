"""The seam between a node and a network: what a node asks of one, and what it answers to one.

The sender's name that a transport hands over is the authenticated one (over gRPC: that of the TLS certificate).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Protocol

from core_training.foundation.foreign_text import harmless
from p2p.messages import GroupHeader, Hello, Receipt, StateRequest, UpdateHeader

CHUNK_BYTES = 1 << 20
"""Most bytes in one message; gRPC's own limit is 4 MB."""


class PeerUnreachable(Exception):
    """A peer did not answer: it is down, still starting, or cut off. Trying again may help."""

    def __init__(self, reason: str) -> None:
        super().__init__(harmless(reason))  # it may be the peer's own


class Transport(Protocol):
    """Calls to a peer. Each raises PeerUnreachable, and ProtocolError when the peer refused with a reason."""

    async def greet(self, peer: str, hello: Hello) -> Hello: ...

    async def publish(self, peer: str, header: UpdateHeader, chunks: Iterable[bytes]) -> Receipt: ...

    def fetch(self, peer: str, request: StateRequest) -> AsyncGenerator[bytes, None]: ...

    async def exchange(self, peer: str, header: GroupHeader, chunks: Iterable[bytes]) -> Receipt: ...


class Handler(Protocol):
    """Calls from a peer. Each raises ProtocolError to refuse, and PeerUnreachable when it is too early to answer."""

    async def on_greeting(self, sender: str, hello: Hello) -> Hello: ...

    async def on_update(self, sender: str, header: UpdateHeader, chunks: AsyncIterator[bytes]) -> Receipt: ...

    def on_fetch(self, sender: str, request: StateRequest) -> AsyncIterator[bytes]: ...

    async def on_group_message(self, sender: str, header: GroupHeader, chunks: AsyncIterator[bytes]) -> Receipt: ...

    def on_malformed(self, sender: str, reason: str) -> None:
        """The transport itself refused something: it could not be read as any message."""
        ...
