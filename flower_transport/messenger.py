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
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore import log
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

FAILED = "the site's messenger failed; the site's own logs/messenger.log says why"
STALLED_AFTER = 60.0
"""Seconds without a new part of a message after which it is given up."""
_POLL_SECONDS = 0.1
_ACQUIRE_TASK = "/flwr.proto.Runtime/AcquireTask"


def serve(app: ClientApp, address: str, secret: bytes) -> None:
    """Answer for the SuperNode that serves the Unix socket at `address`, for ever.

    The socket lies where nobody else could put one; `secret` proves to the SuperNode who is asking.
    """
    supernode = _client(address, SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[_ACQUIRE_TASK]))
    while True:
        acquired = supernode.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not acquired.token:
            time.sleep(_POLL_SECONDS)
            continue
        try:
            _carry_out(app, _client(address, RuntimeTokenHttpInterceptor(acquired.token)))
        except KeyboardInterrupt:
            log(INFO, "Flower withdrew the task")


def _carry_out(app: ClientApp, task: RuntimeHttpClient) -> None:
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(task))
    heartbeat.start()
    try:
        message, context, _, _ = pull_task_input(_Impatient(task, STALLED_AFTER))
        reply, status = _answer(app, message, context)
        push_message(task, reply, context)
        push_task_output(task, context, status, "")
    finally:
        heartbeat.stop()
        task.close()


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
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILED), reply_to=message), SubStatus.FAILED


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
