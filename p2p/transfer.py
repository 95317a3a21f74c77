"""States cut into chunks and put together again, never taking more memory than was agreed on before."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator

from core_training.foundation.errors import ProtocolError
from p2p.transport import CHUNK_BYTES


def split(data: bytes) -> Iterator[bytes]:
    """The data in pieces of at most `CHUNK_BYTES`."""
    view = memoryview(data)
    for start in range(0, len(data), CHUNK_BYTES):
        yield bytes(view[start : start + CHUNK_BYTES])


async def collect(chunks: AsyncIterator[bytes], size: int, sha256: str) -> bytes:
    """All chunks as one. Raises ProtocolError when they are not `size` bytes with this digest, as soon as it shows."""
    received = bytearray()
    async for chunk in chunks:
        if len(chunk) > CHUNK_BYTES:
            raise ProtocolError(f"a chunk of {len(chunk)} bytes; the most is {CHUNK_BYTES}")
        if len(received) + len(chunk) > size:
            raise ProtocolError(f"more than the {size} bytes that were announced")
        received += chunk
    if len(received) != size:
        raise ProtocolError(f"{len(received)} bytes came where {size} were announced")
    if hashlib.sha256(received).hexdigest() != sha256:
        raise ProtocolError("the content does not have the SHA-256 that was announced")
    return bytes(received)
