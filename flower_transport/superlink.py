"""Flower's SuperLink with one door closed: only this machine may operate it.

`python -m flower_transport.superlink …` takes the options of `flower-superlink`.
Flower serves three interfaces on one port: sites speak to the Fleet API, which checks their keys. The Control API
(register a site, submit a run) and the Runtime API (hand over tasks) ask for no credentials at all; here they answer
to connections from this machine alone, so that reaching the port is not enough to join or to command.
"""

from __future__ import annotations

import uvicorn
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.supercore.logger import console_handler
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.main import create_app
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_TO_SITES = ("/v1/fleet/", "/health")


class OperateFromThisMachine:
    """ASGI middleware: requests from other machines reach only the paths in `OPEN_TO_SITES`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith(OPEN_TO_SITES) or _from_this_machine(scope):
            await self._app(scope, receive, send)
            return
        answer = PlainTextResponse("this interface answers only on the server's own machine", status_code=403)
        await answer(scope, receive, send)


def _from_this_machine(scope: Scope) -> bool:
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return False
    # A connection from a machine to its own address has that address at both ends.
    return client[0] in ("127.0.0.1", "::1") or client[0] == server[0]


def main() -> None:
    """Run the SuperLink until it is stopped."""
    config = _parse_superlink_lifespan_config()
    app = create_app(config, SuperLinkLifespan)
    app.add_middleware(OperateFromThisMachine)
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        log_config=get_uvicorn_log_config(console_handler.level),
        access_log=False,
        proxy_headers=False,
        workers=1,
    )


if __name__ == "__main__":
    main()
