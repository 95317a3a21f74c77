"""Fetches messages from the site's SuperNode and has fedloom's ClientApp answer them: `python -m client.messenger`.

It stands where Flower would start one process after the other (`--isolation process`). Two things are gained: nothing
of the bundle that came with a run is ever unpacked or executed here, and an answer costs no process start.
"""

from __future__ import annotations

import sys
import time
from logging import ERROR, INFO
from pathlib import Path

from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode, SubStatus
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

from client.app import app
from security.private_files import read_private_file

FAILED = "the site's messenger failed; the site's own logs/messenger.log says why"
_POLL_SECONDS = 0.1
_ACQUIRE_TASK = "/flwr.proto.Runtime/AcquireTask"


def run(address: str, secret: bytes) -> None:
    """Serve the SuperNode whose Runtime API is at `address`, for ever; `secret` proves to it who is asking."""
    supernode = _client(address, SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[_ACQUIRE_TASK]))
    while True:
        acquired = supernode.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not acquired.token:
            time.sleep(_POLL_SECONDS)
            continue
        try:
            _carry_out(_client(address, RuntimeTokenHttpInterceptor(acquired.token)))
        except KeyboardInterrupt:
            log(INFO, "Flower withdrew the task")


def _carry_out(task: RuntimeHttpClient) -> None:
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(task))
    heartbeat.start()
    try:
        message, context, _, _ = pull_task_input(task)
        reply, status = _answer(message, context)
        push_message(task, reply, context)
        push_task_output(task, context, status, "")
    finally:
        heartbeat.stop()
        task.close()


def _answer(message: Message, context: Context) -> tuple[Message, str]:
    try:
        return app(message, context), SubStatus.COMPLETED
    except Exception:
        # The exception may hold anything of this site: it is told here, not to whoever gave the order.
        log(ERROR, "an order could not be answered", exc_info=True)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILED), reply_to=message), SubStatus.FAILED


def _client(address: str, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # between two processes of this machine, on its loopback interface
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors],
        retry_invoker=make_simple_http_retry_invoker(),
    )


if __name__ == "__main__":
    run(address=sys.argv[1], secret=read_private_file(Path(sys.argv[2])))
