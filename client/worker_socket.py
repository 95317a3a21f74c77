"""The socket between a site's SuperNode and its worker: where it lies, and how an envelope crosses it.

A frame is four bytes (length of the header, big-endian), the header (JSON: kind, fields as a JSON text, payload_bytes)
and the payload. A length is checked before memory is taken for it. Knows nothing of what the envelopes say.
"""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import BinaryIO

from core_training.foundation.bounded_reading import ForeignTextError, parse_json
from core_training.foundation.errors import ProtocolError
from security import private_sockets
from strategies.messages import Envelope

SOCKET = "worker.sock"
MAX_HEADER_BYTES = 16 * 2**20
_LENGTH = struct.Struct(">I")


def listen(folder: Path) -> socket.socket:
    """Take the place of whoever listened in `folder` before. Only the folder's owner can connect."""
    return private_sockets.listen(folder / SOCKET)


def connect(folder: Path) -> socket.socket:
    """A connection to whoever listens in `folder`. Raises OSError when nobody does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with private_sockets.address_of(folder / SOCKET) as address:
            connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def send(connection: socket.socket, envelope: Envelope) -> None:
    """Write one frame."""
    document = {"kind": envelope.kind, "fields": envelope.text, "payload_bytes": len(envelope.payload)}
    header = json.dumps(document, separators=(",", ":")).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"the fields of the '{envelope.kind}' message take more than {MAX_HEADER_BYTES} bytes")
    connection.sendall(_LENGTH.pack(len(header)) + header)
    if envelope.payload:  # the other side may have left already when there is nothing more to come
        connection.sendall(envelope.payload)


def receive(connection: socket.socket, max_payload_bytes: int) -> Envelope:
    """Read one frame.

    Raises ProtocolError for a frame that is malformed or over the limits, and ConnectionError when the other side
    leaves before the frame is whole.
    """
    with connection.makefile("rb") as stream:
        (length,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
        if length > MAX_HEADER_BYTES:
            raise ProtocolError(f"a header of {length} bytes is over the limit of {MAX_HEADER_BYTES}")
        kind, text, payload_bytes = _parse_header(_read(stream, length))
        if payload_bytes > max_payload_bytes:
            raise ProtocolError(
                f"the '{kind}' message holds {payload_bytes} bytes of tensors, over this site's limit of "
                f"{max_payload_bytes} (max_message_bytes in site.yaml)"
            )
        return Envelope(kind, text, _read(stream, payload_bytes))


def _parse_header(header: bytes) -> tuple[str, str, int]:
    try:
        document = parse_json(header)
        kind, text, payload_bytes = document["kind"], document["fields"], document["payload_bytes"]
    except (ForeignTextError, TypeError, KeyError):
        raise ProtocolError("the header is not JSON with kind, fields and payload_bytes") from None
    if not isinstance(kind, str) or not isinstance(text, str) or type(payload_bytes) is not int or payload_bytes < 0:
        raise ProtocolError("the header's kind, fields and payload_bytes must be two texts and a count")
    return kind, text, payload_bytes


def _read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise ConnectionError(f"the connection ended after {len(data)} of {size} bytes")
    return data
