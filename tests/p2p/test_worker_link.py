"""A node's worker, as a real process: whatever ends it, the node's orders are answered."""

import asyncio
import os
import signal

import pytest

from client import worker_client
from core_training.foundation import background
from core_training.foundation.errors import RunError
from p2p import worker_link
from p2p.worker_link import worker_of
from security.certificates import create_node_certificate
from strategies.messages import Envelope, Refusal

pytestmark = pytest.mark.slow
ORDER = Envelope.of("hello", {})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "site.yaml").write_text("name: a\n")
    create_node_certificate(tmp_path / "keys", "a")
    return tmp_path


def kill_worker(folder):
    os.kill(background.owner(worker_client.worker_lock(folder)), signal.SIGKILL)


def answer(ask):
    return Refusal.open(asyncio.run(ask(ORDER))).reason


def test_a_killed_worker_is_started_again_and_answers(folder):
    with worker_of(folder) as ask:
        assert answer(ask) == "unknown order 'hello'"
        kill_worker(folder)
        assert answer(ask) == "unknown order 'hello'"
    assert background.owner(worker_client.worker_lock(folder)) is None


def test_a_worker_that_cannot_be_kept_going_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(worker_link, "_RESTARTS", 1)
    with worker_of(folder) as ask:
        kill_worker(folder)
        (folder / "worker.sock").unlink()
        (folder / "worker.sock").mkdir()
        with pytest.raises(RunError, match=r"ended again after 1 restarts; .*worker\.log says why"):
            answer(ask)


def test_a_worker_that_was_left_behind_is_replaced(folder):
    left = worker_client.start_worker(folder)
    with worker_of(folder) as ask:
        assert left.wait(10) != 0
        assert answer(ask) == "unknown order 'hello'"
