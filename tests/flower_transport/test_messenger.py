"""The messenger: what leaves a site when an order cannot be answered, and how long parts of a message are awaited."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.supercore.task_identity import TaskIdentity

from client import worker_socket
from client.app import SITE_FOLDER, WORKER_FAILED, app
from flower_transport import messenger
from flower_transport.records import from_message, to_messages
from strategies.messages import Envelope, Refusal


@pytest.fixture
def message() -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    return to_messages({2: Envelope.of("join", {})}, ttl=60)[0]


@pytest.fixture
def context() -> Context:
    return Context(1, 2, {}, RecordDict(), {})


def test_what_is_wrong_with_the_worker_is_told_at_the_site_alone(
    tmp_path: Path,
    message: Message,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(SITE_FOLDER, str(tmp_path))
    with worker_socket.listen(tmp_path):  # and no site.yaml: reading it fails, with its path
        refusal = Refusal.open(from_message(app(message, context)))
    assert refusal == Refusal(reason=WORKER_FAILED)
    assert str(tmp_path) in caplog.text


def test_a_defect_of_the_messenger_is_told_at_the_site_alone(
    message: Message, context: Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(SITE_FOLDER, raising=False)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    reply, _ = messenger._answer(app, message, context)
    assert reply.error.reason == messenger.FAILED
    assert f"KeyError: '{SITE_FOLDER}'" in caplog.text


class Task:
    """A SuperNode's task of which `available` parts are there."""

    def __init__(self, *available: str) -> None:
        self.available = available

    def PullObject(self, request: Any) -> PullObjectResponse:
        there = request.object_id in self.available
        return PullObjectResponse(object_found=True, object_available=there, object_content=b"part" if there else b"")


def test_a_part_that_does_not_come_is_reported_lost_after_the_stall_and_not_before() -> None:
    missing = PullObjectRequest(object_id="missing")
    assert messenger._Impatient(Task(), stalled_after=60.0).PullObject(missing).object_found
    assert not messenger._Impatient(Task(), stalled_after=-1.0).PullObject(missing).object_found


def test_parts_that_come_pass_through() -> None:
    impatient = messenger._Impatient(Task("there"), stalled_after=-1.0)
    assert impatient.PullObject(PullObjectRequest(object_id="there")).object_content == b"part"
