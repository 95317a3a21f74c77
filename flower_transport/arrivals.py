"""Replies on their way to the server, over a SuperLink: each is fetched by itself, once all of it is there.

A SuperLink announces a reply when its sender begins to send it. Flower's own grid then waits for the parts of one reply
after the other, so that a site which dies or stalls while sending holds up every reply behind its own for as long as
Flower keeps its session open: three minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects
from flwr.superlink.grid import HttpGrid

from flower_transport.reply import Reply


@dataclass
class _Coming:
    """A reply that was announced: its id, its parts' ids, and those of them that were there when last asked for."""

    number: str
    parts: list[str]
    seen: set[str] = field(default_factory=set)
    is_lost: bool = False


class Arrivals:
    """The replies to one server's orders. What of a reply is not all there yet is not kept, and costs no memory."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._coming: dict[str, _Coming] = {}

    def take(self, orders: Sequence[str]) -> Iterator[Reply]:
        """The replies to these orders that have come whole, or that will never come whole, one at a time."""
        self._hear_of(orders)
        for order in orders:
            coming = self._coming.get(order)
            if coming is not None and (reply := self._fetch(order, coming)) is not None:
                del self._coming[order]
                yield reply
                del reply  # before the next one is fetched

    def forget(self) -> None:
        """Wait for none of the replies any more."""
        self._coming.clear()

    def _hear_of(self, orders: Sequence[str]) -> None:
        unheard = [order for order in orders if order not in self._coming]
        if not unheard:
            return
        announced = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=unheard))
        for message, tree in zip(announced.messages_list, announced.message_object_trees, strict=True):
            parts = [part.object_id for part in iterate_object_tree(tree)]
            self._coming[message.metadata.reply_to_message_id] = _Coming(message.metadata.message_id, parts)

    def _fetch(self, order: str, coming: _Coming) -> Reply | None:
        """A reply, where all its parts are there; None while some are to come."""
        contents: dict[str, bytes] = {}
        # First those that were not there before: what is whole is fetched once, what is on its way twice at most.
        for parts in dict.fromkeys([tuple(part for part in coming.parts if part not in coming.seen), (*coming.parts,)]):
            try:
                contents = pull_objects(list(parts), self._watched(coming), max_tries_per_object=1)
            except ObjectPullError:
                return Reply.broken_off(order) if coming.is_lost else None
        client, run = self._grid._runtime_client, self._grid.run.run_id
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self._grid.node, run_id=run, message_object_id=coming.number)
        )
        return Reply(order, cast(Message, inflate_object_from_contents(coming.number, contents)))

    def _watched(self, coming: _Coming) -> Callable[[str], bytes]:
        """A function that fetches a part, and notes in `coming` whether it was there, is to come, or is lost."""
        fetch = make_pull_object_fn_protobuf(
            self._grid._runtime_client.PullObject, self._grid.node, self._grid.run.run_id
        )

        def watched(part: str) -> bytes:
            try:
                content: bytes = fetch(part)
            except ObjectPullError:
                coming.is_lost = True
                raise
            coming.seen.add(part)
            return content

        return watched
