"""What a SuperLink of ours keeps: sites' numbers beyond its end, messages until all of them is there and confirmed."""

from __future__ import annotations

import contextlib
import dataclasses
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import core_training.foundation.environment  # noqa: F401  isort: skip - before Flower is imported
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from core_training.foundation.errors import InputError
from flower_transport.bells import Bells
from flower_transport.link_state import MOST_HANDED_OUT, SuperLinkState
from flower_transport.message_parts import BROUGHT, LONG_BYTES, MessageParts, PartsClient


@dataclasses.dataclass
class Link:
    """A SuperLink's state with one run and one site that is online."""

    folder: Path

    def __post_init__(self) -> None:
        self.start()
        self.node = self.state.create_node("owner", "owner", b"key", 0)
        self.begin()
        assert self.state.activate_node(self.node, 30)

    def start(self) -> None:
        """Begin as a SuperLink that was restarted does."""
        self.bells = Bells()
        self.parts = MessageParts(self.folder / "parts")
        self.state = SuperLinkState(NoOpFederationManager(), self.parts, self.folder / "nodes.json", self.bells)

    def begin(self) -> None:
        self.run = self.state.create_run(None, None, "hash", {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self.run, SUPERLINK_NODE_ID

    def message(self, text: str, reply_to: Message | None = None) -> Message:
        content = RecordDict({"text": ConfigRecord({"text": text})})
        if reply_to is None:
            made = Message(content, dst_node_id=self.node, message_type="query", ttl=60.0)
        else:
            made = Message(content, reply_to=reply_to)
        made.metadata.__dict__["_message_id"] = made.object_id
        return made

    def store(self, message: Message) -> Iterator[None]:
        """Store a message, one part at a time; it is whole at the end."""
        session = self.state.start_session(self.run)
        bare = remove_content_from_message(message)
        bare.metadata.__dict__["_message_id"] = message.object_id
        stored, missing = self.state.store_message_and_object_tree(bare, get_object_tree(message), session)
        assert stored
        for number, part in get_all_nested_objects(message).items():
            if number in missing:
                yield
                assert self.state.store_object(self.run, session, number, part.deflate())

    def send(self, text: str, reply_to: Message | None = None) -> Message:
        message = self.message(text, reply_to)
        for _ in self.store(message):
            pass
        return message

    def orders(self) -> list[str]:
        return [one.metadata.message_id for one in self.state.get_message_ins(self.node, 1)]

    def answers(self, order: Message) -> list[str]:
        return [one.metadata.message_id for one in self.state.get_message_res({order.metadata.message_id}, self.run)]

    def rings(self, key: Any) -> bool:
        return key in self.bells._ringing


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    before = {name: getattr(TaskIdentity, f"_{name}") for name in ("task_id", "run_id", "node_id")}
    yield Link(tmp_path)
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


def test_an_order_is_handed_out_once_all_of_it_is_there_and_a_bell_says_so(link: Link) -> None:
    message = link.message("order")
    for _ in link.store(message):
        assert link.orders() == []
        assert not link.rings(link.node)
    assert link.rings(link.node)
    assert link.orders() == [message.object_id]
    assert not link.rings(link.node)


def test_an_answer_is_told_once_all_of_it_is_there(link: Link) -> None:
    order = link.send("order")
    link.orders()
    answer = link.message("answer", order)
    for _ in link.store(answer):
        assert link.answers(order) == []
        assert not link.rings(order.object_id)
    assert link.rings(order.object_id)
    assert link.answers(order) == [answer.object_id]
    assert not link.rings(order.object_id)


def test_the_bell_of_a_site_goes_on_while_there_is_another_order(link: Link) -> None:
    first, second = link.send("first"), link.send("second")
    assert link.orders() == [first.object_id]
    assert link.rings(link.node)
    link.parts.delete(first.object_id)
    assert link.orders() == [second.object_id]
    assert not link.rings(link.node)


def test_an_order_that_is_not_confirmed_is_handed_out_again_a_few_times(link: Link) -> None:
    """The answer that named it was lost: its connection had broken."""
    order = link.send("order")
    for _ in range(MOST_HANDED_OUT):
        assert link.orders() == [order.object_id]
    assert link.orders() == []


def test_an_order_that_is_confirmed_is_handed_out_no_more(link: Link) -> None:
    order = link.send("order")
    assert link.orders() == [order.object_id]
    link.parts.delete(order.object_id)  # as Flower does when it is confirmed
    assert link.orders() == []


def test_who_waits_for_a_sites_answer_looks_when_the_site_leaves(link: Link) -> None:
    order = link.send("order")
    assert link.orders() == [order.object_id]
    assert link.state.deactivate_node(link.node)
    assert link.rings(order.object_id)
    (gone,) = link.state.get_message_res({order.object_id}, link.run)
    assert gone.has_error()


def test_an_answer_to_an_order_that_is_too_old_is_none_and_no_failure(link: Link) -> None:
    message = Message(RecordDict(), dst_node_id=link.node, message_type="query", ttl=0.05)
    message.metadata.__dict__["_message_id"] = message.object_id
    for _ in link.store(message):
        pass
    import time

    time.sleep(0.1)
    assert link.answers(message) == []
    assert link.state.get_message_res({"never known"}, link.run) == []


def test_a_superlink_that_was_restarted_knows_its_sites_by_their_numbers(link: Link) -> None:
    other = link.state.create_node("owner", "owner", b"other", 0)
    link.start()
    assert link.state.get_node_id_by_public_key(b"key") == link.node
    assert {node.node_id: node.status for node in link.state.get_node_info()} == {
        link.node: "offline",
        other: "registered",
    }
    with pytest.raises(ValueError, match="already in use"):
        link.state.create_node("owner", "owner", b"key", 0)
    assert link.state.activate_node(link.node, 30)


def test_a_site_that_goes_on_asking_is_online_again_after_a_restart(link: Link) -> None:
    link.start()
    link.begin()
    assert link.state.get_nodes(link.run) == set()
    assert link.orders() == []
    assert link.state.get_nodes(link.run) == {link.node}
    assert link.state.deactivate_node(link.node)
    assert link.orders() == [], "only the first question after a restart says that a site is there"
    assert link.state.get_nodes(link.run) == set()


@pytest.mark.parametrize("content", ["no list", "[1]", '[{"nodeId": "x"}]', '[{"unknown": 1}]', "{}", "[[[["])
def test_a_list_of_nodes_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "nodes.json").write_text(content)
    if content == "{}":  # no node at all
        Link(tmp_path)
        return
    with pytest.raises(InputError, match=r"nodes\.json: this is no list of a SuperLink's nodes"):
        Link(tmp_path)


def test_a_reply_that_is_whole_counts_though_its_site_has_gone(link: Link) -> None:
    order = link.send("order")
    link.orders()
    answer = link.send("answer", order)
    assert link.state.deactivate_node(link.node)
    assert link.answers(order) == [answer.object_id]


def test_an_order_that_a_site_had_in_hand_when_it_left_is_lost_though_the_site_is_back(link: Link) -> None:
    """Its next SuperNode knows nothing of it; one that it had not confirmed is handed out again."""
    in_hand, on_its_way = link.send("in hand"), link.send("on its way")
    assert link.orders() == [in_hand.object_id]
    link.parts.delete(in_hand.object_id)
    assert link.orders() == [on_its_way.object_id]
    assert link.state.deactivate_node(link.node)
    assert link.state.activate_node(link.node, 30)
    (gone,) = link.state.get_message_res({in_hand.object_id, on_its_way.object_id}, link.run)
    assert (gone.has_error(), gone.metadata.reply_to_message_id) == (True, in_hand.object_id)
    link.state.delete_messages({in_hand.object_id})
    assert link.orders() == [on_its_way.object_id]


def test_a_part_that_is_sent_again_was_stored(link: Link) -> None:
    """The answer to the same call was lost: whoever sent it would else give up."""
    message = link.message("order")
    session = link.state.start_session(link.run)
    bare = remove_content_from_message(message)
    bare.metadata.__dict__["_message_id"] = message.object_id
    link.state.store_message_and_object_tree(bare, get_object_tree(message), session)
    for number, part in get_all_nested_objects(message).items():
        assert link.state.store_object(link.run, session, number, part.deflate())
        assert link.state.store_object(link.run, session, number, part.deflate())
    assert not link.state.store_object(link.run, session, "0" * 64, b"noise")


def tree(number: str, *children: ObjectTree) -> ObjectTree:
    return ObjectTree(object_id=number * 64, children=children)


@pytest.mark.parametrize(
    "grown",
    [
        tree("a", tree("b"), tree("b")),
        tree("a", tree("b", tree("c")), tree("d", tree("b"))),
        tree("1", tree("2", tree("3", tree("4", tree("5", tree("6", tree("7", tree("8", tree("9"))))))))),
    ],
    ids=["a part twice", "the same part with other parts", "too deep"],
)
def test_a_tree_that_would_take_for_ever_to_walk_is_none(link: Link, grown: ObjectTree) -> None:
    before = len(link.parts)
    with pytest.raises(ValueError, match=r"are not those|levels"):
        link.parts.preregister(link.run, grown)
    assert len(link.parts) == before


def test_a_message_brings_its_own_parts_and_no_others(link: Link) -> None:
    message, session, before = link.message("order"), link.state.start_session(link.run), len(link.parts)
    assert link.state.store_message_and_object_tree(message, tree("a"), session) == (False, [])
    assert len(link.parts) == before


def test_what_nobody_fetches_is_not_kept(link: Link) -> None:
    """Orders of a site that left, replies that broke off: a run of a thousand rounds would fill a disk."""
    for number in range(5):
        unread, answered = link.send(f"unread {number}"), link.send(f"answered {number}")
        half = link.store(link.message("x" * 2 * LONG_BYTES + str(number), answered))
        next(half)
        with contextlib.suppress(StopIteration):
            next(half)
        link.state.delete_messages({unread.object_id, answered.object_id})
    assert len(link.parts) == 0
    assert list((link.folder / "parts").iterdir()) == []
    assert link.state._object_push_session_by_root == {}
    link.send("at the end")
    task = link.state.run_ids[link.run].run.primary_task_id
    assert link.state.claim_task(task) is not None
    assert link.state.activate_task(task)
    assert link.state.finish_task(task, "completed", "")
    assert len(link.parts) == 0


# --- what a site may bring


def comes_through(link: Link, message: Message) -> bool:
    """Whether all parts of a message are taken."""
    try:
        for _ in link.store(message):
            pass
    except AssertionError:
        return False
    return True


@pytest.fixture
def small_disk(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of twenty long parts."""

    def usage(folder: Path) -> Any:
        return SimpleNamespace(free=20 * LONG_BYTES - sum(file.stat().st_size for file in folder.iterdir()))

    monkeypatch.setattr("flower_transport.message_parts.shutil.disk_usage", usage)


@pytest.mark.usefixtures("small_disk")
def test_a_sites_answers_take_no_more_of_a_disk_than_they_leave(link: Link) -> None:
    orders = [link.send(f"order {number}") for number in range(5)]
    answers = [link.message(f"{number}" * 3 * LONG_BYTES, order) for number, order in enumerate(orders)]
    assert [comes_through(link, answer) for answer in answers] == [True, True, True, False, False]
    link.state.delete_messages({orders[0].object_id})  # as when the ServerApp has it
    again = link.send("once more")
    assert comes_through(link, link.message("z" * 3 * LONG_BYTES, again))
    assert comes_through(link, link.message("y" * 8 * LONG_BYTES))  # an order, which is the server's own
    link.state.delete_messages({order.object_id for order in (*orders, again)})
    assert not any(link.parts._brought.values())
    assert link.parts._bringers == {}


def test_a_sites_short_parts_fill_no_memory(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flower_transport.message_parts._MOST_SHORT_BYTES", 2 * LONG_BYTES)
    orders = [link.send(f"order {number}") for number in range(4)]
    answers = [link.message(f"{number}" * (LONG_BYTES - 2000), order) for number, order in enumerate(orders)]
    assert [comes_through(link, answer) for answer in answers] == [True, True, False, False]
    assert comes_through(link, link.message("x" * (LONG_BYTES - 2000)))


def test_a_part_that_nobody_announced_in_this_session_is_not_written(link: Link) -> None:
    order = link.send("order")
    answer = link.message("x" * 2 * LONG_BYTES, order)
    pushing = link.store(answer)
    next(pushing)
    for number, part in get_all_nested_objects(answer).items():
        for session in ("", "another", link.state.start_session(link.run)):
            assert not link.state.store_object(link.run, session, number, part.deflate())
    assert list((link.folder / "parts").iterdir()) == []
    assert comes_through(link, link.message("other", link.send("other")))


# --- parts


@pytest.fixture
def long(link: Link) -> tuple[str, bytes]:
    """The id and the content of a part that is long, which the store waits for."""
    message = link.message("x" * LONG_BYTES)
    link.parts.preregister(link.run, get_object_tree(message))
    parts = {number: part.deflate() for number, part in get_all_nested_objects(message).items()}
    return max(parts.items(), key=lambda one: len(one[1]))


def test_a_long_part_lies_in_a_file_of_its_owner_until_it_is_deleted(link: Link, long: tuple[str, bytes]) -> None:
    number, content = long
    assert link.parts.get(number) == b""
    link.parts.put(number, content)
    assert link.parts.get(number) == content
    assert (link.folder / "parts" / number).read_bytes() == content
    assert stat.S_IMODE((link.folder / "parts").stat().st_mode) == 0o700
    link.parts.delete_objects_in_run(link.run)
    assert link.parts.get(number) is None
    assert list((link.folder / "parts").iterdir()) == []


def test_a_part_that_is_another_than_it_says_or_that_nobody_waits_for_is_not_kept(
    link: Link, long: tuple[str, bytes]
) -> None:
    number, content = long
    with pytest.raises(ValueError, match="does not match"):
        link.parts.put(number, content + b" ")
    link.parts.delete_objects_in_run(link.run)
    with pytest.raises(Exception, match="not pre-registered"):
        link.parts.put(number, content)
    assert list((link.folder / "parts").iterdir()) == []


def test_parts_of_an_earlier_superlink_are_removed(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "left-over").write_bytes(b"x")
    MessageParts(tmp_path / "parts")
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_part_that_is_brought_as_a_file_is_checked_like_any_other(link: Link, long: tuple[str, bytes]) -> None:
    number, content = long
    file = link.folder / "parts" / number
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="does not match"):
        link.parts.settle(number, BROUGHT)
    assert link.parts.get(number) == b""
    file.write_bytes(content)
    link.parts.put(number, link.parts.settle(number, BROUGHT))
    assert link.parts.get(number) == content
    link.parts.put(number, link.parts.settle(number, BROUGHT))  # said again
    with pytest.raises(FileNotFoundError):
        link.parts.settle(number_of_nothing(link), BROUGHT)
    for forged in (b"\0", b"\1", b""):
        with pytest.raises(ValueError, match="does not match"):
            link.parts.settle("0" * 64, forged)


def number_of_nothing(link: Link) -> str:
    """The id of a part that is waited for, and is nowhere."""
    message = link.message("nowhere")
    link.parts.preregister(link.run, get_object_tree(message))
    return str(message.object_id)


def test_who_works_on_the_same_machine_brings_and_takes_long_parts_as_files(
    link: Link, long: tuple[str, bytes]
) -> None:
    number, content = long
    client = object.__new__(PartsClient)
    client.folder = link.folder / "parts"
    called: list[Any] = []
    client._unary_unary = lambda request, **_: called.append(request)
    client.PushObject(PushObjectRequest(object_id=number, object_content=content))
    assert called.pop().object_content == BROUGHT
    assert [file.name for file in client.folder.iterdir()] == [number]
    link.parts.put(number, link.parts.settle(number, BROUGHT))
    assert client.PullObject(PullObjectRequest(object_id=number)).object_content == content
    assert called == []
    for request, call in (
        (PushObjectRequest(object_id="s", object_content=b"short"), client.PushObject),
        (PullObjectRequest(object_id="s"), client.PullObject),
    ):
        call(request)
        assert called.pop() == request
