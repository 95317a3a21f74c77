"""The parts of a message that came over Flower's wire, made a message again within bounds.

Flower joins an array from its chunks as often as the array names them, so that little on the wire can be much in
memory. Hence nothing is inflated before it is known what that takes, and the sender's bytes end no process.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping

from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from core_training.foundation.errors import ProtocolError
from flower_transport.records import MAX_FIELDS_CHARACTERS

BESIDE_PAYLOAD_BYTES = 4 * MAX_FIELDS_CHARACTERS
"""Most bytes of a message besides its payload: the fields, in UTF-8."""

_PARTS_BESIDE_CHUNKS = 16
_DESCRIPTION_BYTES = 2**20
"""Most bytes of a part that only names others, as the record of a payload of 70 GiB does."""


def part_ids(tree: ObjectTree, payload_bytes: int) -> list[str]:
    """The ids of a message's parts. Raises ProtocolError where they are more than such a payload is cut into."""
    parts = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
    most = _PARTS_BESIDE_CHUNKS + (payload_bytes + BESIDE_PAYLOAD_BYTES) // FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    if len(parts) > most:
        raise ProtocolError(f"the message comes in {len(parts)} parts, and {most} are the most")
    return parts


def bounded(fetch: Callable[[str], bytes], payload_bytes: int) -> Callable[[str], bytes]:
    """`fetch` for all parts of one message; it raises ProtocolError where they are more than such a payload takes."""
    most, received, lock = payload_bytes + BESIDE_PAYLOAD_BYTES, 0, threading.Lock()

    def fetch_bounded(part: str) -> bytes:
        nonlocal received
        content = fetch(part)
        with lock:
            received += len(content)
            if received > most:
                raise ProtocolError(f"the message is longer than the {most} bytes that one may have")
        return content

    return fetch_bounded


def inflate(number: str, contents: dict[str, bytes], payload_bytes: int) -> Message:
    """The message with this id, made of all its parts, which `contents` then holds no longer.

    Raises ProtocolError where they make no message, or one whose arrays take more than both `payload_bytes` and what
    was received: chunks may repeat, as those of zeros do, within what the payload may be.
    """
    try:
        _check_size(contents, payload_bytes)
        message = inflate_object_from_contents(number, contents)
    except ProtocolError:
        raise
    except Exception as error:  # whatever Flower, or a parser below it, makes of bytes that somebody else chose
        raise ProtocolError(f"the message is malformed ({type(error).__name__})") from None
    if not isinstance(message, Message):
        raise ProtocolError(f"the message is malformed (a {type(message).__name__})")
    if not message.has_error() and not isinstance(message.content, RecordDict):
        raise ProtocolError(f"the message is malformed (its content is a {type(message.content).__name__})")
    return message


def _check_size(contents: Mapping[str, bytes], payload_bytes: int) -> None:
    joined = described = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == ArrayChunk.__qualname__:
            continue
        described += len(content)
        if kind != ConfigRecord.__qualname__ and len(content) > _DESCRIPTION_BYTES:
            raise ProtocolError(f"the message has a part of {len(content)} bytes that only names others")
        if kind == Array.__qualname__:
            chunks = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            joined += sum(len(contents[children[chunk]]) for chunk in chunks)
    if described > BESIDE_PAYLOAD_BYTES + _PARTS_BESIDE_CHUNKS * _DESCRIPTION_BYTES:
        raise ProtocolError(f"the message has {described} bytes besides its payload")
    most = max(payload_bytes + _DESCRIPTION_BYTES, sum(map(len, contents.values())))
    if joined > most:
        raise ProtocolError(f"the message's chunks repeat: {joined} bytes, and {most} are the most")
