"""The gate before Flower's SuperLink: who may make which call.

Flower serves three interfaces on one port. Sites speak to the Fleet API, which checks a signature with each call. The
Control API (register a site, start a run) and the Runtime API (take a task, carry it out) ask for no credentials at
all. Here each call to them shows the operator's credential, wherever it comes from; of their calls only those that
fedloom makes exist; and no run starts whose bundle is not fedloom's own.
"""

from __future__ import annotations

from flwr.proto.control_pb2 import StartRunRequest
from google.protobuf.message import DecodeError
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from flower_transport.bodies import FLEET, HEALTH, SMALL_BYTES, BodyTooLong, again, read, refuse
from flower_transport.bundle import is_own_bundle
from flower_transport.credential import is_shown

OPEN_TO_SITES = frozenset(
    {
        HEALTH,
        *(
            f"{FLEET}{call}"
            for call in (
                *("register-node", "unregister-node", "activate-node", "deactivate-node", "send-node-heartbeat"),
                *("get-run", "get-fab"),
                *("pull-messages", "push-messages", "pull-object", "push-object", "confirm-message-received"),
            )
        ),
    }
)
START_RUN = "/v1/control/start-run"
OPEN_TO_OPERATOR = frozenset(
    {
        *(f"/v1/control/{call}" for call in ("register-node", "list-nodes", "start-run", "stop-run", "list-runs")),
        *(
            f"/v1/runtime/{call}"
            for call in (
                *("acquire-task", "send-task-heartbeat", "pull-task-input", "push-task-output", "get-nodes"),
                *("pull-messages", "push-messages", "pull-object", "push-object", "confirm-message-received"),
            )
        ),
    }
)


class Gate:
    """ASGI middleware: what is in neither list does not exist, and the operator's list answers who shows `credential`.

    A refusal is 403, or 413 for a call to start a run that is over `SMALL_BYTES`; fedloom's bundle takes one.
    """

    def __init__(self, app: ASGIApp, credential: str) -> None:
        self._app = app
        self._credential = credential

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_TO_SITES):
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await WebSocketClose()(scope, receive, send)
        elif not is_shown(scope, self._credential):
            await refuse(scope, receive, send, 403, "this interface answers who shows the operator's credential")
        elif scope["path"] not in OPEN_TO_OPERATOR:
            await refuse(scope, receive, send, 403, "fedloom makes no such call")
        elif scope["path"] == START_RUN:
            await self._start_run(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _start_run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read(receive, SMALL_BYTES)
        except BodyTooLong:
            await refuse(scope, receive, send, 413, f"a call to start a run takes {SMALL_BYTES} bytes at most")
        except TimeoutError:
            await refuse(scope, receive, send, 408, "the body of this call did not come in time")
        else:
            if _starts_own_bundle(body[0].get("body", b"")):
                await self._app(scope, again(body, receive), send)
            else:
                await refuse(scope, receive, send, 403, "the bundle is not the one of the fedloom installed here")


def _starts_own_bundle(body: bytes) -> bool:
    try:
        request = StartRunRequest.FromString(body)
    except DecodeError:
        return False
    # Other fields name bundles that lie elsewhere, or bring in what a run of fedloom's has not.
    named = {field.name for field, _ in request.ListFields()}
    return named <= {"fab", "override_config"} and is_own_bundle(request.fab.content)
