"""A server's way to its sites: the connected ones, orders out, replies in."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from flower_transport.records import to_messages
from flower_transport.reply import Reply
from strategies.messages import Envelope

if TYPE_CHECKING:
    import flwr.serverapp


_FETCHED_AT_ONCE = 4
_LOOKS_EVERY = 0.2


class Grid(Protocol):
    """The nodes of one run, known by their numbers."""

    def nodes(self) -> list[int]:
        """The nodes connected now."""
        ...

    def send(self, envelopes: Mapping[int, Envelope], ttl: float) -> dict[str, int]:
        """Send each node its order, to be delivered within `ttl` seconds; returns the orders' ids and their nodes."""
        ...

    def allow_payloads(self, payload_bytes: int) -> None:
        """Take in answers whose payload has so many bytes; before, none is longer than a message's fields may be."""
        ...

    def replies(self, orders: Sequence[str], patience: float) -> Iterator[Reply]:
        """The answers to these orders that have arrived and were not asked for before.

        They come one by one, so that memory does not grow with the number of sites. It waits for the first of them,
        `patience` seconds or less; an answer that is only partly there is left for the next time.
        """
        ...


class FlowerGrid:
    """The same over a grid of Flower's, be it of a SuperLink or of a simulation, where no reply stalls on its way."""

    def __init__(self, grid: flwr.serverapp.Grid) -> None:
        from flwr.superlink.grid import HttpGrid

        from flower_transport.arrivals import Arrivals

        self._grid = grid
        self._arrivals = Arrivals(grid) if isinstance(grid, HttpGrid) else None
        self._payload_bytes = 0

    def nodes(self) -> list[int]:
        return list(self._grid.get_node_ids())

    def send(self, envelopes: Mapping[int, Envelope], ttl: float) -> dict[str, int]:
        return dict(zip(self._grid.push_messages(to_messages(envelopes, ttl)), envelopes, strict=True))

    def allow_payloads(self, payload_bytes: int) -> None:
        self._payload_bytes = payload_bytes

    def replies(self, orders: Sequence[str], patience: float) -> Iterator[Reply]:
        if self._arrivals is not None:
            return self._arrivals.take(orders, self._payload_bytes, patience)
        return self._a_few_at_a_time(orders, patience)

    def _a_few_at_a_time(self, orders: Sequence[str], patience: float) -> Iterator[Reply]:
        are_none = True
        for first in range(0, len(orders), _FETCHED_AT_ONCE):
            for message in self._grid.pull_messages(orders[first : first + _FETCHED_AT_ONCE]):
                are_none = False
                yield Reply.of(message)
        if are_none:
            time.sleep(min(_LOOKS_EVERY, patience))
