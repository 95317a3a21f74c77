"""A server's way to its sites: the connected ones, orders out, replies in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from flower_transport.records import from_message, to_messages
from strategies.messages import Envelope

if TYPE_CHECKING:
    import flwr.app
    import flwr.serverapp


class Reply:
    """An answer that has arrived, to the message `order`."""

    def __init__(self, message: flwr.app.Message) -> None:
        self.order: str = message.metadata.reply_to_message_id
        self._message = message

    def envelope(self) -> Envelope:
        """Its content. Raises ProtocolError when it is malformed, or Flower reports a failure."""
        return from_message(self._message)


class Grid(Protocol):
    """The nodes of one run, known by their numbers."""

    def nodes(self) -> list[int]:
        """The nodes connected now."""
        ...

    def send(self, envelopes: Mapping[int, Envelope], ttl: float) -> dict[str, int]:
        """Send each node its order, to be delivered within `ttl` seconds; returns the orders' ids and their nodes."""
        ...

    def replies(self, orders: Sequence[str]) -> Iterator[Reply]:
        """The answers to these orders that have arrived and were not asked for before."""
        ...


class FlowerGrid:
    """The same over a grid of Flower's, be it of a SuperLink or of a simulation."""

    def __init__(self, grid: flwr.serverapp.Grid) -> None:
        self._grid = grid

    def nodes(self) -> list[int]:
        return list(self._grid.get_node_ids())

    def send(self, envelopes: Mapping[int, Envelope], ttl: float) -> dict[str, int]:
        return dict(zip(self._grid.push_messages(to_messages(envelopes, ttl)), envelopes, strict=True))

    def replies(self, orders: Sequence[str]) -> Iterator[Reply]:
        for message in self._grid.pull_messages(orders):
            yield Reply(message)
