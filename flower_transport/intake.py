"""The parts of a message that came over Flower's wire, made a message again within bounds.

Flower joins an array from its chunks as often as the array names them, so that little on the wire can be much in
memory. Hence nothing is inflated before it is known what that takes, and the sender's bytes end no process.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects

from core_training.foundation.errors import ProtocolError
from flower_transport.records import MAX_FIELDS_CHARACTERS

BESIDE_PAYLOAD_BYTES = 4 * MAX_FIELDS_CHARACTERS
"""Most bytes of a message besides its payload: the fields, in UTF-8."""

_PARTS_BESIDE_CHUNKS = 16
_DESCRIPTION_BYTES = 2**20
"""Most bytes of a part that only names others, as the record of a payload of 70 GiB does."""


def fetch(tree: ObjectTree, pull: Callable[[str], bytes], payload_bytes: int) -> dict[str, bytes]:
    """The parts of a message, each asked for once, by their ids.

    Raises ProtocolError where they are more than such a payload takes, ObjectPullError where one is lost.
    """
    parts = part_ids(tree, payload_bytes)
    contents: dict[str, bytes] = pull_objects(parts, bounded(pull, payload_bytes), max_tries_per_object=1)
    return contents


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
        arrays = _arrays(contents, payload_bytes)
        # Flower would hold an array's bytes three times while it joins them: it is given empty chunks in their place.
        made: dict[str, InflatableObject] = {
            chunk: ArrayChunk(memoryview(b"")) for chunks in arrays for chunk in chunks
        }
        message = inflate_object_from_contents(number, contents, objects=made)
        _fill(message, arrays, contents)
    except ProtocolError:
        raise
    except Exception as error:  # whatever Flower, or a parser below it, makes of bytes that somebody else chose
        raise ProtocolError(f"the message is malformed ({type(error).__name__})") from None
    if not isinstance(message, Message):
        raise ProtocolError(f"the message is malformed (a {type(message).__name__})")
    if not message.has_error() and not isinstance(message.content, RecordDict):
        raise ProtocolError(f"the message is malformed (its content is a {type(message.content).__name__})")
    return message


def _fill(message: InflatableObject, arrays: list[list[str]], contents: dict[str, bytes]) -> None:
    """Put the bytes of the one array that a message of ours has into it. Raises ProtocolError for several."""
    if not arrays or not isinstance(message, Message) or not isinstance(message.content, RecordDict):
        return
    empty = [
        array for record in message.content.values() if isinstance(record, ArrayRecord) for array in record.values()
    ]
    if len(arrays) != 1 or len(empty) != 1:
        raise ProtocolError(f"the message is malformed ({len(arrays)} arrays)")
    empty[0].data = _joined(arrays[0], contents)


def _arrays(contents: Mapping[str, bytes], payload_bytes: int) -> list[list[str]]:
    """The ids of each array's chunks in their order, a chunk as often as it comes.

    Raises ProtocolError where the message would take more memory than it may.
    """
    arrays: list[list[str]] = []
    joined = described = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == ArrayChunk.__qualname__:
            continue
        described += len(content)
        if kind != ConfigRecord.__qualname__ and len(content) > _DESCRIPTION_BYTES:
            raise ProtocolError(f"the message has a part of {len(content)} bytes that only names others")
        if kind == Array.__qualname__:
            chunks = [children[place] for place in json.loads(get_object_body(content, Array))["arraychunk_ids"]]
            if any(_kind_of(contents[chunk]) != ArrayChunk.__qualname__ for chunk in set(chunks)):
                raise ProtocolError("the message is malformed (an array of what is no chunk)")
            joined += sum(len(contents[chunk]) for chunk in chunks)
            arrays.append(chunks)
    if described > BESIDE_PAYLOAD_BYTES + _PARTS_BESIDE_CHUNKS * _DESCRIPTION_BYTES:
        raise ProtocolError(f"the message has {described} bytes besides its payload")
    most = max(payload_bytes + _DESCRIPTION_BYTES, sum(map(len, contents.values())))
    if joined > most:
        raise ProtocolError(f"the message's chunks repeat: {joined} bytes, and {most} are the most")
    return arrays


def _kind_of(content: bytes) -> str:
    kind: str = get_object_head_values_from_object_content(content)[0]
    return kind


def _joined(chunks: list[str], contents: dict[str, bytes]) -> memoryview:
    """The bytes of an array, taken out of `contents` piece by piece."""
    left = Counter(chunks)
    whole = memoryview(bytearray(sum(len(get_object_body(contents[chunk], ArrayChunk)) for chunk in chunks)))
    end = 0
    for chunk in chunks:
        body = get_object_body(contents[chunk], ArrayChunk)
        begin, end = end, end + len(body)
        whole[begin:end] = body
        left[chunk] -= 1
        if not left[chunk]:
            del contents[chunk]
    return whole.toreadonly()
