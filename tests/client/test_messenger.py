"""What leaves a site when an order cannot be answered: a fixed text, and nothing of where the site keeps its files."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import messenger, worker_socket
from client.app import SITE_FOLDER, WORKER_FAILED, app
from strategies.exchange import Envelope, Refusal
from strategies.flower_records import from_message, to_message


@pytest.fixture
def message() -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    return to_message(Envelope("join", {}), 2, ttl=60)


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
    reply, _ = messenger._answer(message, context)
    assert reply.error.reason == messenger.FAILED
    assert f"KeyError: '{SITE_FOLDER}'" in caplog.text
