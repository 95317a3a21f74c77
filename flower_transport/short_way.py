"""The calls by which messages travel, on a short way to Flower's handlers.

Flower's application takes each call through some ten layers of Starlette and FastAPI, which cost many times what its
handlers do, and a message is ten such calls. Here they are read, their sender is known by Flower's own checks, and its
handlers answer. Whatever does not end in success takes the long way, where Flower says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from flwr.proto import fleet_pb2, message_pb2, runtime_pb2
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.error import FlowerError
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from flower_transport.bodies import again, read
from flower_transport.limits import LARGE_BYTES

Answer = Callable[[Request, Any], Any]
"""A handler of a call: its request, with the message that is its body, to the message that answers it."""


def _of_site(handler: Callable[..., Any], *, takes_parts: bool = False) -> Answer:
    """A handler of a site's calls, which are signed."""

    def answer(request: Request, message: Any) -> Any:
        request.state.protobuf_request = message
        authenticate_node(request)
        state = get_linkstate(request)
        return handler(message, state, state.object_store) if takes_parts else handler(message, state)

    return answer


def _of_task(handler: Callable[..., Any]) -> Answer:
    """A handler of a ServerApp's calls, which show its task's token."""

    def answer(request: Request, message: Any) -> Any:
        state = get_linkstate(request)
        task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state)
        return handler(message, state, task)

    return answer


_CALLS: dict[str, tuple[type[Any], Answer]] = {
    "/v1/fleet/pull-messages": (
        fleet_pb2.PullMessagesRequest,
        _of_site(fleet_handlers.pull_messages, takes_parts=True),
    ),
    "/v1/fleet/push-messages": (fleet_pb2.PushMessagesRequest, _of_site(fleet_handlers.push_messages)),
    "/v1/fleet/push-object": (message_pb2.PushObjectRequest, _of_site(fleet_handlers.push_object)),
    "/v1/fleet/pull-object": (message_pb2.PullObjectRequest, _of_site(fleet_handlers.pull_object)),
    "/v1/fleet/confirm-message-received": (
        message_pb2.ConfirmMessageReceivedRequest,
        _of_site(fleet_handlers.confirm_message_received, takes_parts=True),
    ),
    "/v1/runtime/pull-messages": (runtime_pb2.PullAppMessagesRequest, _of_task(runtime_handlers.pull_messages)),
    "/v1/runtime/push-messages": (runtime_pb2.PushAppMessagesRequest, _of_task(runtime_handlers.push_messages)),
    "/v1/runtime/push-object": (message_pb2.PushObjectRequest, _of_task(runtime_handlers.push_object)),
    "/v1/runtime/pull-object": (message_pb2.PullObjectRequest, _of_task(runtime_handlers.pull_object)),
    "/v1/runtime/confirm-message-received": (
        message_pb2.ConfirmMessageReceivedRequest,
        _of_task(runtime_handlers.confirm_message_received),
    ),
}


class ShortWay:
    """ASGI middleware, behind whatever bounds bodies and admits the operator's calls."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _CALLS.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if call is None:
            await self._app(scope, receive, send)
            return
        body = await read(receive, LARGE_BYTES)
        answer = await run_in_threadpool(_answer, *call, Request(scope), body[0].get("body", b""))
        if answer is None:
            await self._app(scope, again(body, receive), send)
            return
        headers = [(b"content-type", PROTOBUF_MEDIA_TYPE.encode()), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


def _answer(kind: type[Any], answer: Answer, request: Request, body: bytes) -> bytes | None:
    """The answer's bytes; None where there is none, for whatever reason."""
    if request.headers.get("content-type") != PROTOBUF_MEDIA_TYPE:
        return None
    try:
        answered: bytes = answer(request, kind.FromString(body)).SerializeToString()
    except (DecodeError, HTTPException, FlowerError, ValueError):
        return None
    return answered
