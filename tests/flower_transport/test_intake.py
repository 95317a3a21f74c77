"""Messages made of parts that somebody else chose: what they take in memory is known first, and no bytes end a process.

No SuperLink; the parts are what Flower's own wire carries.
"""

from __future__ import annotations

import json

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from flwr.supercore.task_identity import TaskIdentity

from core_training.foundation.errors import ProtocolError
from flower_transport.intake import BESIDE_PAYLOAD_BYTES, bounded, inflate, part_ids
from flower_transport.records import from_message, to_messages
from strategies.messages import Envelope

CHUNK = bytes(range(256)) * 2**12
"""1 MiB."""


def part(kind: type, body: bytes, *children: str) -> bytes:
    head = HEAD_VALUE_DIVIDER.join((kind.__qualname__, ",".join(children), str(len(body))))
    return head.encode() + HEAD_BODY_DIVIDER + body


def not_json() -> dict[str, bytes]:
    """Parts whose last, as in each of these functions, is the root."""
    return parts_by_id(part(ArrayRecord, b"{not json"))


def no_message() -> dict[str, bytes]:
    return parts_by_id(part(ArrayRecord, b"{}"))


def no_records(message: Message) -> dict[str, bytes]:
    content = part(ConfigRecord, b"")
    return parts_by_id(content, part(Message, body_of(message), get_object_id(content)))


def repeating(message: Message, times: int) -> dict[str, bytes]:
    """A message with one chunk of 1 MiB that its array names so often."""
    chunk = part(ArrayChunk, CHUNK)
    described = {"dtype": "uint8", "shape": [1], "stype": "bytes", "arraychunk_ids": [0] * times}
    array = part(Array, json.dumps(described).encode(), get_object_id(chunk))
    arrays = part(ArrayRecord, json.dumps({"payload": get_object_id(array)}).encode(), get_object_id(array))
    header = ConfigRecord({"kind": "echo", "fields": "{}"})
    children = {"envelope": header.object_id, "payload": get_object_id(arrays)}
    records = part(RecordDict, json.dumps(children).encode(), *children.values())
    root = part(Message, body_of(message), get_object_id(records))
    return parts_by_id(chunk, array, arrays, header.deflate(), records, root)


def body_of(message: Message) -> bytes:
    return message.deflate().split(HEAD_BODY_DIVIDER, 1)[1]


def parts_by_id(*contents: bytes) -> dict[str, bytes]:
    return {get_object_id(content): content for content in contents}


def tree_of(parts: dict[str, bytes]) -> ObjectTree:
    *others, root = parts
    return ObjectTree(object_id=root, children=[ObjectTree(object_id=other) for other in others])


@pytest.fixture
def message() -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    return to_messages({2: Envelope.of("join", {})}, ttl=60)[0]


def test_what_is_no_message_is_malformed(message: Message) -> None:
    for parts in (
        not_json(),
        no_message(),
        no_records(message),
        parts_by_id(b"noise"),
        parts_by_id(part(Array, b"{}")),
    ):
        with pytest.raises(ProtocolError, match="malformed"):
            inflate([*parts][-1], parts, 0)


def test_an_array_that_names_a_chunk_too_often_is_refused_before_it_is_joined(message: Message) -> None:
    parts = repeating(message, times=300)
    with pytest.raises(ProtocolError, match="repeat"):
        inflate([*parts][-1], parts, 100 * 2**20)
    parts = repeating(message, times=2)
    with pytest.raises(ProtocolError, match="repeat"):
        inflate([*parts][-1], parts, 0)


def test_a_state_of_zeros_whose_chunks_repeat_comes_through(message: Message) -> None:
    envelope = Envelope.of("echo", {}, bytes(3 * FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE))
    sent = to_messages({2: envelope}, ttl=60)[0]
    parts = {name: content.deflate() for name, content in get_all_nested_objects(sent).items()}
    assert sum(map(len, parts.values())) < len(envelope.payload) / 2
    assert from_message(inflate(sent.object_id, parts, len(envelope.payload))) == envelope


def test_too_many_parts_are_refused_before_one_is_fetched() -> None:
    tree = ObjectTree(object_id="root", children=[ObjectTree(object_id=str(number)) for number in range(1000)])
    with pytest.raises(ProtocolError, match="1001 parts"):
        part_ids(tree, 0)
    assert len(part_ids(tree, 1000 * FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)) == 1001


def test_parts_are_fetched_up_to_the_most_bytes_of_a_message() -> None:
    fetch = bounded(lambda _: bytes(2**20), 2 * 2**20)
    for number in range(BESIDE_PAYLOAD_BYTES // 2**20 + 2):
        fetch(str(number))
    with pytest.raises(ProtocolError, match="longer"):
        fetch("one more")
