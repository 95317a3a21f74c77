"""A grid inside one process: the real server loop talks to the real ClientApp, with no network between.

Orders are carried out when their replies are asked for, one site after another, in the order they were sent. Each
passes through Flower's own serialisation, so that nothing works here that would not travel.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from flower_transport.apps import Handle, make_client_app
from flower_transport.records import to_messages
from flower_transport.reply import Reply
from strategies.messages import Envelope


class InProcessGrid:
    """A `flower_transport.grid.Grid` of nodes whose orders `handle` answers."""

    def __init__(self, handle: Handle, nodes: Iterable[int]) -> None:
        self._app = make_client_app(handle)
        self._contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in nodes}
        self._pending: dict[str, Message] = {}
        # Flower stamps every message with the run and the node of the process that makes it.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def nodes(self) -> list[int]:
        return list(self._contexts)

    def send(self, envelopes: Mapping[int, Envelope], ttl: float) -> dict[str, int]:
        messages = {message.object_id: message for message in to_messages(envelopes, ttl)}
        self._pending.update(messages)
        return dict(zip(messages, envelopes, strict=True))

    def allow_payloads(self, payload_bytes: int) -> None:
        """Bound nothing: whoever answers here is this process itself."""

    def replies(self, orders: Sequence[str], patience: float) -> Iterator[Reply]:
        for order in orders:
            if (message := self._pending.pop(order, None)) is not None:
                yield Reply.of(_carry(self._answer(_carry(message))))

    def _answer(self, message: Message) -> Message:
        """The app's answer; as on a real node, an exception becomes an error reply."""
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _carry(message: Message) -> Message:
    """The message as it comes out at the other end of Flower's wire."""
    parts = {identifier: part.deflate() for identifier, part in get_all_nested_objects(message).items()}
    carried = inflate_object_from_contents(message.object_id, parts)
    assert isinstance(carried, Message)
    carried.metadata.__dict__["_message_id"] = message.object_id
    return carried
