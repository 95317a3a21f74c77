"""Flower's SuperLink behind a gate: sites reach what is theirs, the operator shows a credential for all else.

`python -m flower_transport.superlink CREDENTIAL_FILE STATE_FOLDER …` takes the options of `flower-superlink`. It starts
no ServerApp: that is up to whoever operates it. Calls that would rather wait are held until there is an answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.supercore.logger import console_handler
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink import main as flowers_superlink
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.federation import FederationManager

from core_training.foundation.careful_logging import carefully, log_carefully
from flower_transport.bells import Bells
from flower_transport.bounded_http import BoundedHttp
from flower_transport.credential import read_credential
from flower_transport.gate import Gate
from flower_transport.held_calls import HeldCalls, HoldingServer
from flower_transport.limits import BodyLimits
from flower_transport.link_state import SuperLinkState
from flower_transport.message_parts import PARTS_FOLDER, MessageParts
from flower_transport.short_way import ShortWay
from security.connection_watch import ConnectionWatch, raise_descriptor_limit

LISTENS_FOR = {
    "/v1/fleet/pull-messages": lambda body: [PullMessagesRequest.FromString(body).node.node_id],
    "/v1/runtime/pull-messages": lambda body: PullAppMessagesRequest.FromString(body).message_ids,
}
"""The bells for which calls to a SuperLink are held: a site's for its orders, a ServerApp's for their answers."""


def main() -> None:
    """Run the SuperLink until it is stopped."""
    credential, folder = read_credential(Path(sys.argv.pop(1))), Path(sys.argv.pop(1))
    config = _parse_superlink_lifespan_config()
    watch, bells = ConnectionWatch(config.port), Bells()
    app = make_app(config, folder, bells, watch)
    app.add_middleware(Gate, credential=credential)
    log_carefully()
    raise_descriptor_limit()
    watch.start()
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        log_config=carefully(get_uvicorn_log_config(console_handler.level)),
        access_log=False,
        proxy_headers=False,
        http=BoundedHttp,
        ws="none",
    )
    HoldingServer(settings, bells).run()


def make_app(config: SuperLinkLifespanConfig, folder: Path, bells: Bells, watch: ConnectionWatch) -> FastAPI:
    """Flower's application with a state of ours in `folder`, behind bounds on bodies; a gate is to stand before it."""
    flowers_superlink.get_objectstore_linkstate_factories = _factories(folder, bells)
    app: FastAPI = flowers_superlink.create_app(config, SuperLinkLifespan)
    app.add_middleware(ShortWay)
    app.add_middleware(
        HeldCalls, bells=bells, keys=LISTENS_FOR, may_wait=lambda scope: watch.is_proven(scope["client"])
    )
    app.add_middleware(BodyLimits, watch=watch)  # behind the gate, which lets no call of the operator's in unproven
    return app


def _factories(
    folder: Path, bells: Bells
) -> Callable[[str, FederationManager], tuple[ObjectStoreFactory, LinkStateFactory]]:
    """A stand-in for Flower's choice of a state."""

    def made(database: str, manager: FederationManager) -> tuple[ObjectStoreFactory, LinkStateFactory]:
        parts = ObjectStoreFactory()
        parts.store_instance = MessageParts(folder / PARTS_FOLDER)
        states = LinkStateFactory(database, manager, parts)
        states.state_instance = SuperLinkState(manager, parts.store_instance, folder / "nodes.json", bells)
        return parts, states

    return made


if __name__ == "__main__":
    main()
