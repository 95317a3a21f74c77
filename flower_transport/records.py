"""Envelopes in Flower's messages and back: the fields as one JSON string, the payload as bytes.

A short payload lies beside the fields: each part of a message is a call of its own on each of its ways. A long one is
an array, which Flower cuts into chunks, so it may be as long as memory allows. Knows nothing of what the fields mean,
of nodes' names, or of the worker behind the ClientApp. Flower is imported when first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from core_training.foundation.errors import ProtocolError
from strategies.messages import Envelope

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message, RecordDict

MESSAGE_TYPE = "query"
"""Flower's message category for every order: the kind of the envelope says which one it is."""

MAX_FIELDS_CHARACTERS = 16 * 2**20
SHORT_PAYLOAD_BYTES = 2**20
"""The longest payload that lies beside the fields: an adapter of a small model."""

_ENVELOPE = "envelope"
_PAYLOAD = "payload"
_BYTES = "bytes"


def to_messages(envelopes: Mapping[int, Envelope], ttl: float | None = None) -> list[Message]:
    """Orders for several nodes. Those with one and the same payload share its record: it is held once."""
    from flwr.app import Message

    payloads = {id(envelope.payload): _to_array(envelope.payload) for envelope in envelopes.values()}
    return [
        Message(
            _to_records(envelope, payloads[id(envelope.payload)]),
            dst_node_id=node_id,
            message_type=MESSAGE_TYPE,
            ttl=ttl,
        )
        for node_id, envelope in envelopes.items()
    ]


def to_reply(envelope: Envelope, order: Message) -> Message:
    """The answer to a message that came from the server."""
    from flwr.app import Message

    return Message(_to_records(envelope, _to_array(envelope.payload)), reply_to=order)


def from_message(message: Message) -> Envelope:
    """The envelope in a message. Raises ProtocolError when Flower reports a failure or the records are malformed."""
    if message.has_error():
        raise ProtocolError(f"no answer came through: {message.error.reason or 'unknown reason'}")
    return _from_records(message.content)


def _to_records(envelope: Envelope, payload: ArrayRecord | None) -> RecordDict:
    from flwr.app import ConfigRecord, RecordDict

    header = ConfigRecord({"kind": envelope.kind, "fields": envelope.text})
    if payload is not None:
        return RecordDict({_ENVELOPE: header, _PAYLOAD: payload})
    if envelope.payload:
        header[_PAYLOAD] = bytes(envelope.payload)
    return RecordDict({_ENVELOPE: header})


def _to_array(payload: bytes | memoryview) -> ArrayRecord | None:
    """A long payload as an array; None for a short one."""
    from flwr.app import Array, ArrayRecord

    if len(payload) <= SHORT_PAYLOAD_BYTES:
        return None
    record = ArrayRecord({_PAYLOAD: Array("uint8", (len(payload),), _BYTES, b"")})
    record[_PAYLOAD].data = payload  # put in here, where a view of bytes need not be copied
    return record


def _from_records(records: RecordDict) -> Envelope:
    from flwr.app import ArrayRecord, ConfigRecord

    # Flower's own views (`records.array_records`, …) are reference cycles that keep the payload until Python's
    # collector comes by, so memory would grow with the number of messages. Hence the records themselves.
    header, arrays = records.get(_ENVELOPE), records.get(_PAYLOAD)
    if not isinstance(header, ConfigRecord) or not set(records) <= {_ENVELOPE, _PAYLOAD}:
        raise ProtocolError(f"the message holds the records {sorted(records)}, not an envelope")
    kind, text = header.get("kind"), header.get("fields")
    if not isinstance(kind, str) or not isinstance(text, str) or len(text) > MAX_FIELDS_CHARACTERS:
        raise ProtocolError("the envelope has no kind or no fields, or they are too long")
    payload = header.get(_PAYLOAD, b"")
    if not isinstance(payload, bytes) or len(payload) > SHORT_PAYLOAD_BYTES:
        raise ProtocolError(f"the payload beside the fields of the '{kind}' message is not one of few bytes")
    if arrays is not None:
        if not isinstance(arrays, ArrayRecord) or list(arrays) != [_PAYLOAD] or arrays[_PAYLOAD].stype != _BYTES:
            raise ProtocolError(f"the payload of the '{kind}' message is not one array of {_BYTES} bytes")
        payload = arrays[_PAYLOAD].data
    return Envelope(kind, text, payload)
