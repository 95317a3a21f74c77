"""A site's SuperNode: it fetches the server's orders, one after the other, and has a ClientApp answer them.

It stands where Flower has a SuperNode, a SuperExec and one process after the other for each order. So nothing of the
bundle that came with a run is fetched, unpacked or executed here, an answer costs no process start, and nobody listens.
The server holds the call for an order until there is one (`flower_transport.held_calls`).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, push_objects
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import RetryInvoker, exponential, make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from core_training.foundation.errors import FedloomError, ProtocolError
from flower_transport.fleet_session import fleet_client
from flower_transport.intake import fetch, inflate
from flower_transport.waiting import PrefersToWait

FAILED = "the site's SuperNode failed; the site's own logs/supernode.log says why"

_ANSWERED_AT_ONCE = 1.0
"""Seconds within which a server that does not hold calls has answered."""

_DIALS_AGAIN_WITHIN = 5
"""The longest pause, in seconds, before a call that failed is made again."""

_PULSE = HEARTBEAT_DEFAULT_INTERVAL / 2
"""Seconds between two heartbeats."""

_LEAST_PAUSE = 0.2
_LONGEST_PAUSE = 3.0

Standing = Literal["connecting", "connected", "refused"]
Note = Callable[[Standing, int | None, str], object]
"""A listener to the node's standing with the server, its number if known, the reason of a refusal."""

_log = logging.getLogger(__name__)


class SuperNode:
    """One site's end of the way to its server."""

    def __init__(
        self,
        app: ClientApp,
        server: str,
        authority: Path,
        key: ec.EllipticCurvePrivateKey,
        note: Note,
        max_message_bytes: int,
    ) -> None:
        """`server` is HOST:PORT, known by a certificate of `authority`; it knows the site by `key`.

        An order whose payload is longer than `max_message_bytes` is refused before it takes more memory than that.
        """
        self._app = app
        self._public_key = public_key_to_bytes(key.public_key())
        self._client = fleet_client(server, authority, key, PrefersToWait("PullMessages"))
        self._link = _Link(note)
        self._retry = self._link.watched(make_simple_http_retry_invoker())
        self._max_message_bytes = max_message_bytes
        self._last_order = time.monotonic()
        self._node = Node()

    def run(self) -> None:
        """Answer the server's orders until this process is stopped, or the server wants nothing more of the site."""
        with self._session():
            while True:
                asked = time.monotonic()
                if (order := self._call(self._pull, PullMessagesRequest(node=self._node))) is not None:
                    self._carry_out(*order)
                    self._last_order = time.monotonic()
                elif (now := time.monotonic()) - asked < _ANSWERED_AT_ONCE:
                    time.sleep(min(_LONGEST_PAUSE, max(_LEAST_PAUSE, (now - self._last_order) / 10)))

    def _pull(self, request: PullMessagesRequest) -> tuple[Message, ObjectTree] | None:
        """The next order without its content, and its parts. Raises RemoteProtocolError for what is no order."""
        received = self._client.PullMessages(request)
        if not received.messages_list:
            return None
        try:
            return message_from_proto(received.messages_list[0]), received.message_object_trees[0]
        except Exception as error:  # whatever Flower makes of what a server chose
            raise httpx.RemoteProtocolError(f"the server's order is malformed ({type(error).__name__})") from None

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Be online at the server while the block runs. Ends this process where the server refuses."""
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            number = self._call(self._client.ActivateNode, request).node_id
        except httpx.HTTPError as error:
            self._link.refused(_words_of(error))
            raise SystemExit(1) from None
        self._node = Node(node_id=number)
        self._link.connected(number)
        threading.Thread(target=keep_beating, args=[self._beat], daemon=True).start()
        try:
            yield
        finally:
            with suppress(httpx.HTTPError):
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=number))

    def _beat(self) -> bool:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            return bool(self._client.SendNodeHeartbeat(request).success)
        except Exception as error:  # without a pulse the site would be taken for gone: it is tried again
            _log.warning("a heartbeat failed: %s", error)
            return False

    def _carry_out(self, order: Message, tree: ObjectTree) -> None:
        """Answer an order, of which `order` holds all but the content."""
        run_id = order.metadata.run_id
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, self._node.node_id
        try:
            reply = self._answer(order, tree)
            _log.info("an order was answered")
            self._send(reply, run_id)
            _log.info("the answer was sent")
        except RunNotRunningException:
            _log.info("an order is dropped: its run has ended")
        except (ObjectPullError, ObjectPushError, httpx.HTTPError) as error:
            _log.error("an order is dropped, whose transfer failed: %s", error)

    def _answer(self, order: Message, tree: ObjectTree) -> Message:
        try:
            message = self._take_in(tree, order.metadata.run_id)
            _log.info("an order was received")
            return self._app(message, Context(order.metadata.run_id, self._node.node_id, {}, RecordDict(), {}))
        except (RunNotRunningException, ObjectPullError, httpx.HTTPError):
            raise
        except ProtocolError as error:
            _log.error("an order was not read: %s", error)
        except Exception:
            # The exception may hold anything of this site: it is told here, not to whoever gave the order.
            _log.exception("an order could not be answered")
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILED), reply_to=order)

    def _take_in(self, tree: ObjectTree, run_id: int) -> Message:
        """The whole order. Raises ProtocolError where it is malformed, or longer than it may be."""
        most = self._max_message_bytes
        pull = make_pull_object_fn_protobuf(
            lambda request: self._call(self._client.PullObject, request), self._node, run_id
        )
        try:
            contents = fetch(tree, pull, most)
        except ProtocolError:
            self._confirm(tree, run_id)  # else it would be handed out again, and be no better
            raise
        self._confirm(tree, run_id)
        message = inflate(tree.object_id, contents, most)
        message.metadata.__dict__["_message_id"] = tree.object_id  # which is made of all else, and so not in it
        return message

    def _confirm(self, tree: ObjectTree, run_id: int) -> None:
        """Tell the server that it need keep an order no longer."""
        self._call(
            self._client.ConfirmMessageReceived,
            ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=tree.object_id),
        )

    def _send(self, reply: Message, run_id: int) -> None:
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
            response = self._call(self._client.PushMessages, request)
            push = make_push_object_fn_protobuf(
                lambda request: self._call(self._client.PushObject, request), self._node, run_id, response.session_id
            )
            push_objects(get_all_nested_objects(reply), push, object_ids_to_push=set(response.objects_to_push))

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        """The server's answer, awaited for as long as it cannot be reached."""
        return self._retry.invoke(method, request)


def keep_beating(beat: Callable[[], bool], wait: Callable[[float], object] = time.sleep) -> NoReturn:
    """Beat for ever, a few times within what a heartbeat is good for; soon again where one did not come through.

    Until the next one does, the server takes the site for away, however busily it answers.
    """
    while True:
        wait(random.uniform(0.8, 1.0) * (_PULSE if beat() else _DIALS_AGAIN_WITHIN))


class _Link:
    """The site's standing with its server, told whenever it changes."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._lock = threading.Lock()
        self._node: int | None = None
        self._stands: Standing | None = None
        self._tell("connecting")

    def watched(self, invoker: RetryInvoker) -> RetryInvoker:
        """Flower's invoker of calls, which says when one has to be repeated, and when one came through.

        It gives up over a certificate that is not to be trusted, and not over every error in which TLS is named: a
        line that breaks, or a server that is killed, in the middle of a handshake is one, too.
        """
        invoker.wait_gen_factory = lambda: exponential(max_delay=_DIALS_AGAIN_WITHIN)
        gives_up = invoker.should_giveup
        invoker.should_giveup = lambda error: not _is_of_the_line(error) and gives_up(error)
        failed, came_through = invoker.on_backoff, invoker.on_success

        def on_backoff(state: Any) -> None:
            self._tell("connecting")
            failed(state)

        def on_success(state: Any) -> None:
            if self._node is not None:
                self._tell("connected")
            came_through(state)

        invoker.on_backoff, invoker.on_success = on_backoff, on_success
        return invoker

    def connected(self, node: int) -> None:
        self._node = node
        self._tell("connected")

    def refused(self, reason: str) -> None:
        self._tell("refused", reason)

    def _tell(self, stands: Standing, detail: str = "") -> None:
        """Report from several threads, whose transfers must not fail because this cannot be written."""
        with self._lock:
            if stands == self._stands:
                return
            try:
                self._note(stands, self._node, detail)
                self._stands = stands
            except (FedloomError, OSError) as error:
                _log.error("how the link stands could not be noted: %s", error)


def _is_of_the_line(error: Exception) -> bool:
    return isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower()


def _words_of(error: httpx.HTTPError) -> str:
    """Flower's words for a refusal, where there are any."""
    if isinstance(error, httpx.HTTPStatusError) and (told := FlowerError.from_json(error.response.text)) is not None:
        return f"[code: {told.code}] {told.message}"
    return str(error).partition("\n")[0]
