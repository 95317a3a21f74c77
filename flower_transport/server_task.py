"""The task of carrying out a run: taken from the SuperLink, and carried out in a process of its own.

It stands where Flower has its SuperExec start one `flwr-serverapp` after the other. Two things are gained: the task's
token is on no command line, and nothing of the bundle that a run was started with is ever unpacked or executed.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

import httpx
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import ServerApp
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from core_training.foundation.errors import FedloomError, RunError
from flower_transport.bundle import is_own_bundle
from flower_transport.message_parts import PartsClient
from flower_transport.operator import Operator, ask


def take_task(operator: Operator, flower_run: int) -> str:
    """The token of the task of a run that was just started.

    Raises RunError where the SuperLink hands out none, or another run's, which is then nobody's.
    """
    client = operator.client(RuntimeHttpClient, "SuperExec")
    try:
        taken = ask(lambda: client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])))
    finally:
        client.close()
    if not taken.token or taken.task.run_id != flower_run:
        raise RunError(f"the SuperLink did not hand out the task of its run {flower_run}")
    return str(taken.token)


def carry_out(app: ServerApp, operator: Operator, token: str, parts: Path) -> None:
    """Carry out the task with this token, and tell the SuperLink how it ended.

    `parts` is the folder in which the SuperLink has the long parts of messages.

    Raises whatever `app` raises, RunError where the run was started with another bundle than fedloom's own, and
    KeyboardInterrupt when the SuperLink withdraws the task.
    """
    client = operator.client(
        PartsClient,
        "flwr-serverapp",
        RuntimeTokenHttpInterceptor(token),
        retry_invoker=make_simple_http_retry_invoker(),
    )
    client.folder = parts
    HeartbeatSender(make_task_heartbeat_fn_http(client)).start()
    status = SubStatus.FAILED
    try:
        _run(app, client, token)
        status = SubStatus.COMPLETED
    finally:
        # The heartbeat goes on as long as the process does; that there is no task any more is no news from here on.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with (
            suppress(httpx.HTTPError, FedloomError),
            operator.client(RuntimeHttpClient, "flwr-serverapp", RuntimeTokenHttpInterceptor(token)) as last,
        ):
            last.PushTaskOutput(PushTaskOutputRequest(sub_status=status))


def _run(app: ServerApp, client: RuntimeHttpClient, token: str) -> None:
    task = client.PullTaskInput(PullTaskInputRequest())
    if not is_own_bundle(task.fab.content):
        raise RunError("the run was started with another bundle than the one of the fedloom that is installed here")
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
        task.task_id,
        task.run.run_id,
        task.context.node_id,
    )
    run, context = run_from_proto(task.run), context_from_proto(task.context)
    context.run_config = run.override_config
    grid = HttpGrid(token=token)
    grid._client = client  # it would make one of its own, which does not show the credential
    grid.set_run(run)
    app(grid, context)
