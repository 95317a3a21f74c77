"""Envelopes in Flower's messages: what goes in comes out, and nothing is kept behind."""

import gc

import pytest

import core_training.foundation.environment  # noqa: F401
from core_training.foundation.errors import ProtocolError
from flower_transport.records import SHORT_PAYLOAD_BYTES, from_message, to_messages
from strategies.messages import Envelope


@pytest.fixture
def message():
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # Flower stamps messages with them
    return to_messages({7: Envelope.of("update", {"round": 3}, b"x" * (SHORT_PAYLOAD_BYTES + 1))})[0]


def test_an_envelope_comes_out_as_it_went_in(message):
    assert from_message(message) == Envelope.of("update", {"round": 3}, b"x" * (SHORT_PAYLOAD_BYTES + 1))


@pytest.mark.parametrize("payload", [b"", b"x", b"x" * SHORT_PAYLOAD_BYTES])
def test_a_short_payload_is_no_part_of_its_own(message, payload):
    short = to_messages({7: Envelope.of("update", {"round": 3}, payload)})[0]
    assert from_message(short) == Envelope.of("update", {"round": 3}, payload)
    assert list(short.content) == ["envelope"]


@pytest.mark.parametrize("payload", [b"x" * (SHORT_PAYLOAD_BYTES + 1), "text", 3])
def test_what_is_no_short_payload_is_refused_beside_the_fields(message, payload):
    short = to_messages({7: Envelope.of("update", {"round": 3})})[0]
    short.content["envelope"]["payload"] = payload
    with pytest.raises(ProtocolError, match="beside the fields"):
        from_message(short)


def test_a_message_that_was_read_is_freed_without_waiting_for_the_garbage_collector(message):
    records = message.content
    before = len(gc.get_referrers(records))
    gc.disable()
    try:
        from_message(message)
        assert len(gc.get_referrers(records)) == before
    finally:
        gc.enable()


def test_a_message_with_other_records_is_no_envelope(message):
    from flwr.app import ConfigRecord

    message.content["other"] = ConfigRecord({"a": 1})
    with pytest.raises(ProtocolError, match="not an envelope"):
        from_message(message)
