"""Replies on their way to the server, over a SuperLink: each is fetched by itself, once all of it is there.

A SuperLink announces a reply when its sender begins to send it. Flower's own grid then waits for the parts of one reply
after the other, so that a site which dies or stalls while sending holds up every reply behind its own for as long as
Flower keeps its session open: three minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_objects
from flwr.superlink.grid import HttpGrid

from core_training.foundation.errors import ProtocolError
from flower_transport.intake import bounded, inflate, part_ids
from flower_transport.reply import Reply


@dataclass
class _Coming:
    """A reply that was announced: its id, its parts, and those of them that were there when last asked for."""

    number: str
    tree: ObjectTree
    seen: set[str] = field(default_factory=set)
    is_lost: bool = False


class _TimeIsOver(Exception):
    """The time in which replies may be fetched is over."""


class Arrivals:
    """The replies to one server's orders. What of a reply is not all there yet is not kept, and costs no memory."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._coming: dict[str, _Coming] = {}

    def take(self, orders: Sequence[str], until: float, payload_bytes: int) -> Iterator[Reply]:
        """The replies to these orders that have come whole, or that will never come whole, one at a time.

        None is fetched once `time.monotonic()` is at `until`; what the caller takes between two of them does not count.
        A reply that is malformed or whose payload has more than `payload_bytes` raises as it is opened.
        """
        self._hear_of(orders)
        for order in orders:
            coming = self._coming.get(order)
            if coming is not None and (reply := self._outcome(order, coming, until, payload_bytes)) is not None:
                del self._coming[order]
                handed_over = time.monotonic()
                yield reply
                del reply  # before the next one is fetched
                until += time.monotonic() - handed_over

    def forget(self) -> None:
        """Wait for none of the replies any more."""
        self._coming.clear()

    def _hear_of(self, orders: Sequence[str]) -> None:
        unheard = [order for order in orders if order not in self._coming]
        if not unheard:
            return
        announced = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=unheard))
        for message, tree in zip(announced.messages_list, announced.message_object_trees, strict=True):
            self._coming[message.metadata.reply_to_message_id] = _Coming(message.metadata.message_id, tree)

    def _outcome(self, order: str, coming: _Coming, until: float, payload_bytes: int) -> Reply | None:
        """A reply, whole or refused; None while parts of it are to come, or the time is over."""
        try:
            contents = self._fetch(coming, until, payload_bytes)
            if contents is None:
                return Reply.broken_off(order) if coming.is_lost else None
            self._confirm(coming)
            return Reply(order, inflate(coming.number, contents, payload_bytes))
        except _TimeIsOver:
            return None
        except ProtocolError as error:
            return Reply.malformed(order, str(error))

    def _fetch(self, coming: _Coming, until: float, payload_bytes: int) -> dict[str, bytes] | None:
        """A reply's parts, where all are there. Raises ProtocolError for too many or too long ones, and _TimeIsOver."""
        every = part_ids(coming.tree, payload_bytes)
        contents: dict[str, bytes] = {}
        # First those that were not there before: what is whole is fetched once, what is on its way twice at most.
        for parts in dict.fromkeys([tuple(part for part in every if part not in coming.seen), (*every,)]):
            fetch = bounded(self._watched(coming, until), payload_bytes)
            try:
                contents = pull_objects(list(parts), fetch, max_tries_per_object=1)
            except ObjectPullError:
                return None
        return contents

    def _confirm(self, coming: _Coming) -> None:
        """Tell the SuperLink that it need keep a reply no longer."""
        client, run = self._grid._runtime_client, self._grid.run.run_id
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self._grid.node, run_id=run, message_object_id=coming.number)
        )

    def _watched(self, coming: _Coming, until: float) -> Callable[[str], bytes]:
        """A function that fetches a part, and notes in `coming` whether it was there, is to come, or is lost.

        It raises _TimeIsOver once it is `until`.
        """
        fetch = make_pull_object_fn_protobuf(
            self._grid._runtime_client.PullObject, self._grid.node, self._grid.run.run_id
        )

        def watched(part: str) -> bytes:
            if time.monotonic() >= until:
                raise _TimeIsOver
            try:
                content: bytes = fetch(part)
            except ObjectPullError:
                coming.is_lost = True
                raise
            coming.seen.add(part)
            return content

        return watched
