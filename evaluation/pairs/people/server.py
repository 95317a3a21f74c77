"""The page's server, on loopback alone: who may come in, what is asked and answered. Verdicts are the desk's.

A page of another origin that is open in the same browser can neither read nor judge: the Host header must be this
server's own (against names that are made to resolve to loopback), the cookie is HttpOnly and SameSite, a request that
names an origin must name ours, and the policy of the page lets it load from here alone.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from core_training.foundation.errors import InputError, RunError
from evaluation.pairs.people import page
from evaluation.pairs.people.desk import Annotator, Desk

_LARGEST = 1024
"""Bytes of a verdict's request."""
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class PeopleServer:
    """A running page. `changed` is set after each verdict, and when all is judged."""

    def __init__(self, desk: Desk, port: int) -> None:
        self.desk = desk
        self.port = port
        self.changed = threading.Event()

    def links(self) -> dict[str, str]:
        """The address that lets each annotator in."""
        return {one.name: f"http://127.0.0.1:{self.port}/enter/{one.token}" for one in self.desk.annotators}

    @property
    def app(self) -> Callable[[Any, Any, Any], Awaitable[None]]:
        routes = [
            Route("/enter/{token}", self._enter),
            Route("/", self._page),
            Route("/page.js", _content(page.SCRIPT, "text/javascript")),
            Route("/page.css", _content(page.STYLE, "text/css")),
            Route("/look", self._look),
            Route("/verdict", self._verdict, methods=["POST"]),
        ]
        return _Guarded(Starlette(routes=routes), {f"127.0.0.1:{self.port}", f"localhost:{self.port}"})

    @property
    def _cookie(self) -> str:
        """A name of this server's own: browsers send cookies to all ports of a host."""
        return f"fedloom-compare-{self.port}"

    def _who(self, request: Request) -> Annotator | None:
        return self.desk.who(request.cookies.get(self._cookie, ""))

    async def _enter(self, request: Request) -> Response:
        token = request.path_params["token"]
        if self.desk.who(token) is None:
            return _refused("this link is of an earlier sitting, or of nobody; take the one that the command printed")
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(self._cookie, token, httponly=True, samesite="strict", path="/")
        return answer

    async def _page(self, request: Request) -> Response:
        if self._who(request) is None:
            return _refused("open the link that the command printed for you")
        return Response(page.HTML, media_type="text/html")

    async def _look(self, request: Request) -> Response:
        if (annotator := self._who(request)) is None:
            return _refused("open the link that the command printed for you")
        number = request.query_params.get("number")
        if number is not None and not (number.isascii() and number.isdigit() and len(number) < 10):
            return PlainTextResponse("number: a whole number", status_code=400)
        return JSONResponse(annotator.state(None if number is None else int(number)))

    async def _verdict(self, request: Request) -> Response:
        if (annotator := self._who(request)) is None:
            return _refused("open the link that the command printed for you")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return PlainTextResponse("a verdict is JSON", status_code=415)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _LARGEST:
                return PlainTextResponse("too large for a verdict", status_code=413)
        try:
            said = json.loads(body)
            look, choice = said["look"], said["choice"]
            if type(look) is not int or type(choice) is not int:
                raise ValueError
            annotator.judge(look, choice)
        except (ValueError, KeyError, TypeError, RecursionError):
            return PlainTextResponse('give {"look": number, "choice": 0, 1 or 2}', status_code=400)
        except RunError as error:
            return PlainTextResponse(f"the verdict was not kept: {error}", status_code=507)
        self.changed.set()
        return JSONResponse(annotator.state())


def _content(text: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return Response(text, media_type=kind)

    return answer


def _refused(word: str) -> Response:
    return PlainTextResponse(word, status_code=403)


class _Guarded:
    """An application that answers those alone who ask this server by its own name, with strict headers on all."""

    def __init__(self, app: Starlette, hosts: set[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == "host"]
        origins = [value for name, value in headers if name == "origin"]
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            await PlainTextResponse("this server is not asked by that name", 421)(scope, receive, sending)
        elif any(origin != f"http://{hosts[0]}" for origin in origins):
            await _refused("asked by another page")(scope, receive, sending)
        else:
            await self._app(scope, receive, sending)


@contextmanager
def serving(desk: Desk, port: int = 0) -> Iterator[PeopleServer]:
    """The page, served on loopback while the block runs; port 0 takes a free one. Raises InputError for a taken one."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen()  # whoever opens a link waits until it is answered
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(f"--port {port}: cannot be listened on: {error}; leave it out for a free one") from None
    found = PeopleServer(desk, listening.getsockname()[1])
    config = uvicorn.Config(
        found.app, log_config=None, access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
