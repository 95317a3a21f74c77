"""Replies on their way to the server, over a SuperLink: each is fetched by itself.

A SuperLink of ours announces a reply once all of it is there (`flower_transport.link_state`): so one that stalls while
it is being sent holds up no other, and what was announced can be fetched at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.superlink.grid import HttpGrid

from core_training.foundation.errors import ProtocolError
from flower_transport.intake import fetch, inflate
from flower_transport.reply import Reply
from flower_transport.waiting import PrefersToWait


class Arrivals:
    """The replies to one server's orders."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._waiting = PrefersToWait("PullMessages")
        client = grid._runtime_client
        client._interceptors = (*client._interceptors, self._waiting)

    def take(self, orders: Sequence[str], payload_bytes: int, patience: float) -> Iterator[Reply]:
        """The replies to these orders that have come, one at a time; waits for the first for `patience` seconds or so.

        A reply that is malformed or whose payload has more than `payload_bytes` raises as it is opened.
        """
        self._waiting.seconds = patience
        client = self._grid._runtime_client
        announced = client.PullMessages(PullAppMessagesRequest(message_ids=orders))
        for message, tree in zip(announced.messages_list, announced.message_object_trees, strict=True):
            yield self._fetch(message.metadata.reply_to_message_id, tree, payload_bytes)

    def _fetch(self, order: str, tree: ObjectTree, payload_bytes: int) -> Reply:
        client, node, run_id = self._grid._runtime_client, self._grid.node, self._grid.run.run_id
        pull = make_pull_object_fn_protobuf(client.PullObject, node, run_id)
        try:
            contents = fetch(tree, pull, payload_bytes)
            return Reply(order, inflate(tree.object_id, contents, payload_bytes))
        except ObjectPullError:
            return Reply.broken_off(order)
        except ProtocolError as error:
            return Reply.malformed(order, str(error))
        finally:  # the SuperLink need keep it no longer, whatever it is
            client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=tree.object_id)
            )
