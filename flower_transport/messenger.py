"""The messenger's side of Flower: messages fetched from a SuperNode, and answered by a ClientApp.

It stands where Flower would start one process after the other (`--isolation process`). Two things are gained: nothing
of the bundle that came with a run is ever unpacked or executed here, and an answer costs no process start.
"""

from __future__ import annotations

import time
from logging import ERROR, INFO
from typing import Any

import httpx
from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore import log
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from core_training.foundation.errors import ProtocolError
from flower_transport.intake import bounded, inflate, part_ids

FAILED = "the site's messenger failed; the site's own logs/messenger.log says why"
STALLED_AFTER = 60.0
"""Seconds without a new part of a message after which it is given up."""
_POLL_SECONDS = 0.1
_ACQUIRE_TASK = "/flwr.proto.Runtime/AcquireTask"


def serve(app: ClientApp, address: str, secret: bytes, max_message_bytes: int) -> None:
    """Answer for the SuperNode that serves the Unix socket at `address`, for ever.

    The socket lies where nobody else could put one; `secret` proves to the SuperNode who is asking. An order whose
    payload is longer than `max_message_bytes` is refused before it takes more memory than that.
    """
    supernode = _client(address, SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[_ACQUIRE_TASK]))
    while True:
        acquired = supernode.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not acquired.token:
            time.sleep(_POLL_SECONDS)
            continue
        try:
            _carry_out(app, _client(address, RuntimeTokenHttpInterceptor(acquired.token)), max_message_bytes)
        except KeyboardInterrupt:
            log(INFO, "Flower withdrew the task")


def _carry_out(app: ClientApp, task: RuntimeHttpClient, max_message_bytes: int) -> None:
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(task))
    heartbeat.start()
    try:
        announced, tree, context = _hear(task)
        try:
            message = _take_in(_Impatient(task, STALLED_AFTER), tree, context, max_message_bytes)
        except ProtocolError as error:
            log(ERROR, "an order was not read: %s", error)
            reply, status = _failure(announced), SubStatus.FAILED
        else:
            reply, status = _answer(app, message, context)
        push_message(task, reply, context)
        push_task_output(task, context, status, "")
    finally:
        heartbeat.stop()
        task.close()


def _hear(task: RuntimeHttpClient) -> tuple[Message, ObjectTree, Context]:
    """A task's message without its content, the tree of its parts, and its context."""
    given = task.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
    TaskIdentity.node_id = given.context.node_id
    announced = task.PullMessages(PullAppMessagesRequest())
    if not announced.messages_list:
        raise RuntimeError("the SuperNode gave out a task without a message")
    message, tree = message_from_proto(announced.messages_list[0]), announced.message_object_trees[0]
    return message, tree, context_from_proto(given.context)


def _take_in(task: _Impatient, tree: ObjectTree, context: Context, max_message_bytes: int) -> Message:
    """The whole message. Raises ProtocolError where it is malformed, or longer than it may be."""
    node = Node(node_id=context.node_id)
    fetch = bounded(make_pull_object_fn_protobuf(task.PullObject, node, context.run_id), max_message_bytes)
    contents = pull_objects(part_ids(tree, max_message_bytes), fetch)
    task.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(node=node, run_id=context.run_id, message_object_id=tree.object_id)
    )
    message = inflate(tree.object_id, contents, max_message_bytes)
    message.metadata.__dict__["_message_id"] = tree.object_id  # which is made of all else, and so not in it
    return message


class _Impatient:
    """A task's client that gives up on a message whose parts have stopped coming.

    When its run ends at the wrong moment, a SuperNode can announce a message whose parts it will never have; Flower
    would ask for them for two hours, and the site would answer nobody meanwhile. The SuperNode is told of the failure
    by the end of the task's heartbeat, and the supervisor starts the messenger again.
    """

    def __init__(self, task: RuntimeHttpClient, stalled_after: float) -> None:
        self._task = task
        self._stalled_after = stalled_after
        self._last_part = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        response: PullObjectResponse = self._task.PullObject(request)
        if response.object_available:
            self._last_part = time.monotonic()
        elif time.monotonic() - self._last_part > self._stalled_after:
            return PullObjectResponse(object_found=False)
        return response


def _answer(app: ClientApp, message: Message, context: Context) -> tuple[Message, str]:
    try:
        return app(message, context), SubStatus.COMPLETED
    except Exception:
        # The exception may hold anything of this site: it is told here, not to whoever gave the order.
        log(ERROR, "an order could not be answered", exc_info=True)
        return _failure(message), SubStatus.FAILED


def _failure(message: Message) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILED), reply_to=message)


def _client(address: str, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
    client = RuntimeHttpClient(
        "http://supernode",
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors],
        verify=False,  # no TLS: the socket is this account's alone
        retry_invoker=make_simple_http_retry_invoker(),
    )
    over_tcp = client._client
    client._client = httpx.Client(transport=httpx.HTTPTransport(uds=address, verify=False), timeout=over_tcp.timeout)
    over_tcp.close()
    return client
