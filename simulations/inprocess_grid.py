"""Flower's Grid inside one process: the real server loop talks to the real ClientApp, with no network between.

Messages are carried out when their replies are pulled, one site after another, in the order they were sent. Each
passes through Flower's own serialisation, so that nothing works here that would not travel.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity


class InProcessGrid(Grid):  # type: ignore[misc]
    """Node ids are those of `contexts`."""

    def __init__(self, app: ClientApp, contexts: dict[int, Context]) -> None:
        self._app = app
        self._contexts = contexts
        self._pending: dict[str, Message] = {}
        # Flower stamps every message with the run and the node of the process that makes it.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    @property
    def run(self) -> Any:
        raise RuntimeError("a simulation in one process has no Flower run")

    def set_run(self, run: Any) -> None:
        raise RuntimeError("a simulation in one process has no Flower run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identifiers = []
        for message in messages:
            identifiers.append(message.object_id)
            self._pending[message.object_id] = message
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for identifier in message_ids:
            if (message := self._pending.pop(identifier, None)) is not None:
                yield _carry(self._answer(_carry(message)))

    def _answer(self, message: Message) -> Message:
        """What the app answers; as on a real node, an exception becomes an error reply."""
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        return self.pull_messages(self.push_messages(messages))


def _carry(message: Message) -> Message:
    """The message as it comes out at the other end of Flower's wire."""
    parts = {identifier: part.deflate() for identifier, part in get_all_nested_objects(message).items()}
    carried = inflate_object_from_contents(message.object_id, parts)
    assert isinstance(carried, Message)
    carried.metadata.__dict__["_message_id"] = message.object_id
    return carried
