"""The worker's socket, with real processes on both ends: what crosses it, what is refused, what survives a kill."""

import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from client import worker_socket
from client.worker_client import ask, start_worker, worker_lock
from core_training import __version__
from core_training.foundation import background
from core_training.foundation.errors import InputError, RunError
from core_training.recipe.reading import parse_recipe
from strategies.messages import Envelope, JoinOrder, JoinReply, Refusal, TrainOrder, Update
from tests import tiny
from tests.site_folder import give_key

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def make_site(folder: Path, more: str = "") -> Path:
    folder.mkdir(mode=0o700, parents=True)
    (folder / "site.yaml").write_text(f"name: a\nserver: localhost:9092\n{more}")
    give_key(folder)
    return folder


def frame_of(header: bytes) -> bytes:
    return struct.pack(">I", len(header)) + header


def start_echo(folder: Path) -> subprocess.Popen:
    worker = subprocess.Popen([sys.executable, "-m", "tests.client.echo_worker", str(folder)], cwd=ROOT)
    wait_for_socket(folder)
    return worker


def wait_for_socket(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            worker_socket.connect(folder).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("the worker does not listen")


@pytest.fixture
def site(tmp_path):
    folder = make_site(tmp_path / "site", "max_message_bytes: 10000000")
    worker = start_echo(folder)
    yield folder
    worker.kill()
    worker.wait()


def test_an_order_comes_back_byte_for_byte(site):
    payload = os.urandom(5_000_001)

    answer = ask(site, Envelope.of("echo", {"text": "ä\n", "list": [1, None, 2.5]}, payload))

    assert answer.kind == "echoed"
    assert answer.fields.items() >= {"text": "ä\n", "list": [1, None, 2.5]}.items()
    assert answer.payload == payload


def test_only_the_owner_may_connect(site):
    assert stat.S_IMODE((site / "worker.sock").stat().st_mode) == 0o600


def test_a_folder_longer_than_a_socket_address_works(tmp_path):
    folder = make_site(tmp_path / ("long-" * 20) / ("name-" * 20))
    worker = start_echo(folder)
    try:
        assert ask(folder, Envelope.of("echo", {})).kind == "echoed"
    finally:
        worker.kill()
        worker.wait()


def test_a_payload_over_the_sites_limit_is_refused_before_it_is_read(site):
    with worker_socket.connect(site) as connection:
        connection.sendall(frame_of(b'{"kind": "train", "fields": "{}", "payload_bytes": 10000001}'))
        answer = worker_socket.receive(connection, 0)

    assert "10000001 bytes of tensors, over this site's limit of 10000000" in Refusal.open(answer).reason


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">I", 2**32 - 1),
        frame_of(b"\xff\xff\xff\xff"),
        frame_of(b"[]"),
        frame_of(b"[" * 100_000),
        frame_of(b'{"kind": "train", "fields": "{}", "payload_bytes": 1.5}'),
        frame_of(b'{"kind": "train", "fields": "{}", "payload_bytes": -1}'),
        frame_of(b'{"kind": "train", "fields": [], "payload_bytes": 1}'),
        frame_of(b'{"kind": "train", "fields": "{}", "payload_bytes": 9}') + b"short",
        frame_of(b'{"kind": "echo", "fields": "[]", "payload_bytes": 0}'),
        frame_of(b'{"kind": "echo", "fields": "nonsense", "payload_bytes": 0}'),
        frame_of(b'{"kind": "echo", "fields": "' + b"[" * 100_000 + b'", "payload_bytes": 0}'),
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
    ],
)
def test_garbage_does_not_stop_the_worker(site, frame):
    process = ask(site, Envelope.of("echo", {})).fields["process"]
    with worker_socket.connect(site) as connection:
        connection.sendall(frame)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(10)
        connection.recv(1000)

    assert ask(site, Envelope.of("echo", {})).fields["process"] == process


def test_an_expected_failure_is_an_answer_and_the_worker_stays(site):
    before = ask(site, Envelope.of("echo", {})).fields["process"]

    assert Refusal.open(ask(site, Envelope.of("hopeless", {}))).reason == "the loss is no longer finite"
    assert ask(site, Envelope.of("echo", {})).fields["process"] == before


def test_a_defect_is_told_and_ends_the_worker(site):
    answer = ask(site, Envelope.of("defect", {}))

    assert "ZeroDivisionError" in Refusal.open(answer).reason
    with pytest.raises(RunError, match="no worker answers"):
        ask(site, Envelope.of("echo", {}), patience=0.5)


def test_an_order_under_way_when_the_worker_is_killed_is_answered_by_its_successor(site, tmp_path):
    successors = []
    order = Envelope.of("echo", {"die_once": str(tmp_path / "died")}, b"state")

    def replace() -> None:
        while not (tmp_path / "died").exists():
            time.sleep(0.05)
        successors.append(start_echo(site))

    replacement = threading.Thread(target=replace)
    replacement.start()
    try:
        answer = ask(site, order)
        replacement.join()
        assert answer.payload == b"state"
        assert answer.fields["process"] == successors[0].pid
    finally:
        successors[0].kill()
        successors[0].wait()


def test_an_order_that_takes_too_long_is_given_up(site):
    with pytest.raises(RunError, match="no answer to 'echo' within"):
        ask(site, Envelope.of("echo", {"sleep": 5}), timeout=0.5)


def test_the_worker_itself_starts_once_and_refuses_what_it_does_not_know(tmp_path):
    folder = make_site(tmp_path / "site")
    worker = start_worker(folder)
    try:
        assert background.owner(worker_lock(folder)) == worker.pid
        assert "unknown order" in Refusal.open(ask(folder, Envelope.of("echo", {}))).reason
        with pytest.raises(InputError, match=f"running already .process {worker.pid}"):
            start_worker(folder)
    finally:
        background.stop(worker_lock(folder))
    assert background.owner(worker_lock(folder)) is None


RECIPE = """
model: {name_or_path: tiny}
stage: pretrain
tuning: {mode: lora, lora: {r: 2}}
data: {train: notes}
training: {max_length: 32, per_device_train_batch_size: 4}
topology: {kind: federated, rounds: 2, local_steps: 2}
"""


def test_a_deepspeed_group_answers_as_one_and_ends_with_its_launcher(tmp_path):
    pytest.importorskip("deepspeed")
    tiny.make_model(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "notes.jsonl", tiny.texts(0, 60))
    folder = make_site(
        tmp_path / "site",
        "data: {notes: ../notes.jsonl}\nmodels: {tiny: ../model}\ndeepspeed: {processes: 2, stage: 1}\n",
    )
    launcher = start_worker(folder)
    group = [int(child) for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    try:
        recipe = parse_recipe(RECIPE).to_yaml()
        join = JoinOrder(run_id="r", version=__version__, recipe=recipe)
        digest = JoinReply.open(ask(folder, join.envelope())).parsed_manifest.digest
        order = TrainOrder(run_id="r", round=1, steps=2, evaluate=False, manifest_digest=digest)
        update = Update.open(ask(folder, order.envelope()))
    finally:
        launcher.kill()
        launcher.wait()

    assert (update.round, update.train.steps) == (1, 2)
    assert len(group) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() for process in group):
        assert time.monotonic() < deadline
        time.sleep(0.1)
