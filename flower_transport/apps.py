"""Flower's two apps, made of functions that know nothing of Flower."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid as FlowersGrid
from flwr.serverapp import ServerApp

from core_training.foundation.errors import FedloomError
from flower_transport.bundle import RUN_ID
from flower_transport.grid import FlowerGrid, Grid
from flower_transport.records import from_message, to_reply
from strategies.messages import Envelope, Refusal

Handle = Callable[[Envelope, int], Envelope]
"""A handler of orders to a node: its number or, in a simulation of Flower's, which of its sites it is, from 0."""

PARTITION = "partition-id"
"""The key under which a simulation of Flower's says which of its sites a node is."""


def make_client_app(handle: Handle) -> ClientApp:
    """A ClientApp that answers each order with `handle(order, node)`; a FedloomError becomes a Refusal."""
    client_app = ClientApp()

    @client_app.query()  # type: ignore[untyped-decorator]
    def answer(message: Message, context: Context) -> Message:
        try:
            reply = handle(from_message(message), int(context.node_config.get(PARTITION, context.node_id)))
        except FedloomError as error:
            reply = Refusal(reason=str(error)).envelope()
        return to_reply(reply, message)

    return client_app


def make_server_app(carry_out: Callable[[Grid, str], object]) -> ServerApp:
    """A ServerApp that has the run named in its configuration carried out: `carry_out(grid, run id)`."""
    server_app = ServerApp()

    @server_app.main()  # type: ignore[untyped-decorator]
    def main(grid: FlowersGrid, context: Context) -> None:
        carry_out(FlowerGrid(grid), str(context.run_config.get(RUN_ID, "")))

    return server_app
