"""Answers on their way over a real SuperLink: one that stalls or breaks off holds up nobody, and costs no round."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import core_training.foundation.environment  # noqa: F401  isort: skip - before Flower is imported
import pytest
from flwr.app import Message
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StopRunRequest
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.fleet_http_connection import http_request_response

from core_training.foundation.errors import ProtocolError
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from flower_transport.grid import FlowerGrid
from flower_transport.records import from_message, to_reply
from flower_transport.reply import Reply
from server.round_loop import run_federation
from strategies.messages import Envelope
from tests.contracts import test_flower as contracts
from tests.flower_transport.test_intake import no_message, not_json, repeating, tree_of
from tests.server.arithmetic_sites import Answer, ArithmeticSite, events

superlink = contracts.superlink
PAYLOAD = bytes(range(256)) * (6 * 2**12)
"""Longer than what Flower sends in one part."""


class Site:
    """A site at the SuperLink that answers each order; `stalls` says before which answers it sends all but one part.

    `resume` lets it go on; `forge` gives the parts of an answer that it sends instead, the root last.
    """

    def __init__(
        self,
        link: Any,
        name: str,
        answer: Answer,
        stalls: Callable[[Envelope], bool] = lambda _: False,
        forge: Callable[[Envelope, Message], dict[str, bytes] | None] = lambda *_: None,
    ):
        self._forge = forge
        self._link, self._answer, self._stalls = link, answer, stalls
        self._key, pem = contracts.new_key()
        link.control().RegisterNode(RegisterNodeRequest(public_key=pem, name=name))
        self.number = 0
        self.resume, self._ends, self._online = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Site:
        self._thread.start()
        assert self._online.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self.resume.set()
        self._thread.join(30)

    def _serve(self) -> None:
        authority = self._link.authority.read_bytes()
        keys = (self._key, self._key.public_key())
        with http_request_response(self._link.address, False, authority, keys, max_retries=2) as connection:
            self.number, receive, send, _, _, pull, push, confirm = connection
            self._online.set()
            while not self._ends.is_set():
                if (came := receive()) is None:
                    time.sleep(0.05)
                    continue
                message, run = self._whole(*came, pull), came[0].metadata.run_id
                confirm(run, message.metadata.message_id)
                reply = to_reply(self._answer(from_message(message)), message)
                reply.metadata.__dict__["_src_node_id"] = self.number
                tree = get_object_tree(reply)
                parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
                if (forged := self._forge(from_message(message), reply)) is not None:
                    tree, parts = tree_of(forged), forged
                reply.metadata.__dict__["_message_id"] = tree.object_id
                wanted, session = send(reply, tree, 0.1)
                *first, last = [(name, part) for name, part in parts.items() if name in wanted]
                for name, part in first:
                    push(run, session, name, part)
                if self._stalls(from_message(message)):
                    self.resume.wait()
                with suppress(Exception):  # the run may be over
                    push(run, session, *last)

    @staticmethod
    def _whole(message: Message, tree: Any, pull: Callable[[int, str], bytes]) -> Message:
        contents = {}
        for part in iterate_object_tree(tree):
            while part.object_id not in contents:
                with suppress(Exception):  # the server is still sending it
                    contents[part.object_id] = pull(message.metadata.run_id, part.object_id)
        carried = inflate_object_from_contents(message.metadata.message_id, contents)
        assert isinstance(carried, Message)
        carried.metadata.__dict__["_message_id"] = message.metadata.message_id
        return carried


@pytest.fixture
def grid(superlink: Any) -> Iterator[HttpGrid]:
    """A ServerApp's grid in a run of its own."""
    before = {name: getattr(TaskIdentity, f"_{name}") for name in ("task_id", "run_id", "node_id")}
    run = contracts.start_run(superlink.control(), "stalls")
    token = superlink.runtime().AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])).token
    made = superlink._kept(HttpGrid(superlink.address, False, superlink.authority.read_bytes(), token=token))
    made._retry_invoker.should_giveup = lambda _: True  # else a refusal would interrupt the tests
    task = made._runtime_client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, run, task.context.node_id
    made.set_run(run_from_proto(task.run))
    yield made
    superlink.control().StopRun(StopRunRequest(run_id=run))
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


def echo(order: Envelope) -> Envelope:
    return Envelope("echo", order.text, PAYLOAD)


def replies(grid: FlowerGrid, orders: list[str], count: int, within: float = 10.0) -> dict[str, Reply]:
    """The first `count` replies to these orders."""
    found: dict[str, Reply] = {}
    deadline = time.monotonic() + within
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} replies after {within} s"
        found |= {
            reply.order: reply
            for reply in grid.replies([order for order in orders if order not in found], patience=5.0)
        }
    return found


def test_a_reply_that_is_still_being_sent_holds_up_no_other_and_comes_when_it_is_whole(
    superlink: Any, grid: HttpGrid
) -> None:
    with Site(superlink, "slow", echo, lambda _: True) as slow, Site(superlink, "quick", echo) as quick:
        flower = FlowerGrid(grid)
        sent = flower.send({site.number: Envelope.of("say", {"to": site.number}) for site in (slow, quick)}, ttl=60)
        order = {node: number for number, node in sent.items()}
        assert set(replies(flower, list(sent), 1)) == {order[quick.number]}
        time.sleep(0.5)
        began = time.monotonic()
        assert list(flower.replies([order[slow.number]], patience=0.0)) == []
        assert time.monotonic() - began < 1
        slow.resume.set()
        (late,) = replies(flower, [order[slow.number]], 1).values()
        assert late.envelope() == Envelope.of("echo", {"to": slow.number}, PAYLOAD)


def test_a_reply_of_which_the_superlink_has_lost_a_part_is_told_as_such(
    superlink: Any, grid: HttpGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Site(superlink, "breaks-off", echo) as site:
        flower = FlowerGrid(grid)
        sent = list(flower.send({site.number: Envelope.of("say", {})}, ttl=60))
        monkeypatch.setattr(grid._runtime_client, "PullObject", lambda _: PullObjectResponse(object_found=False))
        with pytest.raises(ProtocolError, match="broke off on the way"):
            replies(flower, sent, 1)[sent[0]].envelope()


def test_a_site_that_stalls_while_it_sends_costs_its_own_update_and_no_more_than_the_deadline(
    superlink: Any, grid: HttpGrid, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(
        topology={"kind": "federated", "rounds": 2, "local_steps": 1, "minimum_sites": 2, "round_deadline": 3.0}
    )
    RunFolder(tmp_path / "run").prepare(recipe, resume=False)
    stalled = lambda order: order.kind == "train" and order.fields["round"] == 1  # noqa: E731
    with (
        Site(superlink, "a", ArithmeticSite(1.0, 10)) as a,
        Site(superlink, "b", ArithmeticSite(4.0, 10)) as b,
        Site(superlink, "c", ArithmeticSite(7.0, 10), stalled) as c,
    ):
        nodes = {a.number: "a", b.number: "b", c.number: "c"}
        began = time.monotonic()
        summary = run_federation(FlowerGrid(grid), tmp_path / "run", lambda: nodes)
        seconds = time.monotonic() - began
    late = [(event["site"], event["round"], event["order"]) for event in events(tmp_path / "run", "late")]
    assert late == [("c", 1, "train"), ("c", 2, "train"), ("c", 2, "evaluate")]
    assert events(tmp_path / "run", "void") == events(tmp_path / "run", "round_void") == []
    assert {name: site.rounds for name, site in summary.sites.items()} == {"a": 2, "b": 2, "c": 0}
    assert seconds < 3 * recipe.topology.round_deadline + 5, "three exchanges, each with its deadline"


def test_a_site_whose_answers_are_no_messages_is_set_aside_by_name_and_the_run_goes_on(
    superlink: Any, grid: HttpGrid, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(
        topology={"kind": "federated", "rounds": 3, "local_steps": 1, "minimum_sites": 2, "round_deadline": 10.0}
    )
    RunFolder(tmp_path / "run").prepare(recipe, resume=False)

    def forge(order: Envelope, reply: Message) -> dict[str, bytes] | None:
        if order.kind != "train":
            return None
        return [not_json(), no_message(), repeating(reply, 300)][order.fields["round"] - 1]

    with (
        Site(superlink, "a", ArithmeticSite(1.0, 10)) as a,
        Site(superlink, "b", ArithmeticSite(4.0, 10)) as b,
        Site(superlink, "c", ArithmeticSite(7.0, 10), forge=forge) as c,
    ):
        nodes = {a.number: "a", b.number: "b", c.number: "c"}
        summary = run_federation(FlowerGrid(grid), tmp_path / "run", lambda: nodes)
    told = [(event["site"], event["round"], event["reason"]) for event in events(tmp_path / "run", "quarantined")]
    assert [(site, number) for site, number, _ in told] == [("c", 1), ("c", 2), ("c", 3)]
    for (*_, reason), word in zip(told, ("JSONDecodeError", "ArrayRecord", "chunks repeat"), strict=True):
        assert word in reason
    assert {name: site.rounds for name, site in summary.sites.items()} == {"a": 3, "b": 3, "c": 0}


def test_a_look_for_replies_lasts_until_there_is_one_or_as_long_as_it_may(superlink: Any, grid: HttpGrid) -> None:
    with Site(superlink, "waits", echo, lambda _: True) as site:
        flower = FlowerGrid(grid)
        (order,) = flower.send({site.number: Envelope.of("say", {})}, ttl=60)
        began = time.monotonic()
        assert list(flower.replies([order], patience=1.0)) == []
        assert 0.9 < time.monotonic() - began < 3
        threading.Timer(0.3, site.resume.set).start()
        assert [reply.order for reply in flower.replies([order], patience=15.0)] == [order]
        assert time.monotonic() - began < 8


def test_a_payload_longer_than_the_sites_agreed_on_is_not_read(superlink: Any, grid: HttpGrid) -> None:
    with Site(superlink, "long", lambda order: Envelope("echo", order.text, bytes(72 * 2**20))) as site:
        flower = FlowerGrid(grid)
        for allowed in (0, 72 * 2**20):
            flower.allow_payloads(allowed)
            (order,) = flower.send({site.number: Envelope.of("say", {})}, ttl=60)
            (reply,) = replies(flower, [order], 1).values()
            if allowed:
                assert len(reply.envelope().payload) == allowed
            else:
                with pytest.raises(ProtocolError, match="repeat"):
                    reply.envelope()
