"""The messenger: what leaves a site when an order cannot be answered, and how long parts of a message are awaited."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectResponse
from flwr.proto.run_pb2 import Run
from flwr.proto.runtime_pb2 import (
    PullAppMessagesResponse,
    PullTaskInputResponse,
    PushAppMessagesResponse,
    SendTaskHeartbeatResponse,
)
from flwr.supercore.task_identity import TaskIdentity

from client import worker_socket
from client.app import SITE_FOLDER, WORKER_FAILED, app
from flower_transport import messenger
from flower_transport.records import from_message, to_messages
from strategies.messages import Envelope, Refusal
from tests.flower_transport.test_intake import not_json, repeating, tree_of


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


class WholeTask(Task):
    """A task whose message has these parts, the root last."""

    def __init__(self, message: Message, parts: dict[str, bytes]) -> None:
        self.message, self.parts = message, parts
        self.pushed: list[Any] = []

    def PullTaskInput(self, _: Any) -> PullTaskInputResponse:
        return PullTaskInputResponse(task_id=1, run=Run(run_id=1), context=ProtoContext(run_id=1, node_id=2))

    def PullMessages(self, _: Any) -> PullAppMessagesResponse:
        self.message.metadata.__dict__["_message_id"] = [*self.parts][-1]
        announced = message_to_proto(remove_content_from_message(self.message))
        return PullAppMessagesResponse(messages_list=[announced], message_object_trees=[tree_of(self.parts)])

    def PullObject(self, request: Any) -> PullObjectResponse:
        content = self.parts[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, _: Any) -> None:
        pass

    def SendTaskHeartbeat(self, _: Any, **__: Any) -> SendTaskHeartbeatResponse:
        return SendTaskHeartbeatResponse(success=True)

    def PushMessages(self, request: Any) -> PushAppMessagesResponse:
        self.pushed.extend(request.messages_list)
        return PushAppMessagesResponse()

    def PushObject(self, _: Any) -> PushObjectResponse:
        raise AssertionError("nothing was asked for")

    def PushTaskOutput(self, _: Any) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("parts", [lambda _: not_json(), lambda message: repeating(message, 300)])
def test_an_order_that_is_malformed_or_would_grow_is_answered_with_a_failure_and_not_read(
    message: Message, parts: Callable[[Message], dict[str, bytes]]
) -> None:
    task = WholeTask(message, parts(message))
    messenger._carry_out(app, task, max_message_bytes=100 * 2**20)  # type: ignore[arg-type]
    (pushed,) = task.pushed
    assert pushed.error.reason == messenger.FAILED
    assert pushed.metadata.reply_to_message_id == [*task.parts][-1]
