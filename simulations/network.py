"""A network in memory that fails on purpose: latency, lost messages, partitions and dead nodes, all from one seed.

Nodes on it are the real ones; only the wires are not. Times are the event loop's.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass

from p2p.messages import GroupHeader, Hello, Receipt, StateRequest, UpdateHeader
from p2p.transport import Handler, PeerUnreachable

_GIVES_UP_AFTER = 5.0
"""Seconds after which a caller takes a lost message for lost."""


@dataclass(frozen=True)
class Partition:
    """A cut between those in `island` and those outside, from `start` to `end` (seconds)."""

    start: float
    end: float
    island: frozenset[str]

    def cuts(self, one: str, other: str, now: float) -> bool:
        return self.start <= now < self.end and (one in self.island) != (other in self.island)


class SimulatedNetwork:
    """The wire between handlers.

    `latency` is the mean one-way delay in seconds (exponentially distributed), `loss` the chance that a message, or
    the answer to it, gets lost.
    """

    def __init__(
        self, seed: int = 0, latency: float = 0.0, loss: float = 0.0, partitions: Iterable[Partition] = ()
    ) -> None:
        self._random = random.Random(seed)
        self._latency = latency
        self._loss = loss
        self._partitions = tuple(partitions)
        self._handlers: dict[str, Handler] = {}

    def attach(self, name: str, handler: Handler) -> None:
        """Bring a node up."""
        self._handlers[name] = handler

    def detach(self, name: str) -> None:
        """Take a node down: calls to it are refused at once."""
        self._handlers.pop(name, None)

    def transport(self, name: str) -> SimulatedTransport:
        """The calling side of a node."""
        return SimulatedTransport(self, name)

    async def deliver(self, sender: str, receiver: str) -> Handler:
        """Take a message to its receiver, or fail to."""
        await self.pass_wire(sender, receiver)
        if (handler := self._handlers.get(receiver)) is None:
            raise PeerUnreachable("connection refused")
        return handler

    def crash(self, name: str) -> None:
        """Take a node down for good: nothing reaches it or comes from it any more."""
        self.detach(name)
        self._partitions += (Partition(0.0, math.inf, frozenset({name})),)

    async def pass_wire(self, sender: str, receiver: str) -> None:
        """Carry one message. Raises PeerUnreachable, after the time it takes to notice, when it is lost."""
        now = asyncio.get_running_loop().time()
        cut = any(partition.cuts(sender, receiver, now) for partition in self._partitions)
        if cut or self._random.random() < self._loss:
            await asyncio.sleep(_GIVES_UP_AFTER)
            raise PeerUnreachable("no answer")
        if self._latency:
            await asyncio.sleep(self._random.expovariate(1 / self._latency))


class SimulatedTransport:
    """The `Transport` of one node on a `SimulatedNetwork`."""

    def __init__(self, network: SimulatedNetwork, name: str) -> None:
        self._network = network
        self._name = name

    async def greet(self, peer: str, hello: Hello) -> Hello:
        handler = await self._network.deliver(self._name, peer)
        answer = await handler.on_greeting(self._name, hello)
        await self._network.pass_wire(peer, self._name)
        return answer

    async def publish(self, peer: str, header: UpdateHeader, chunks: Iterable[bytes]) -> Receipt:
        handler = await self._network.deliver(self._name, peer)
        receipt = await handler.on_update(self._name, header, _stream(chunks))
        await self._network.pass_wire(peer, self._name)
        return receipt

    async def fetch(self, peer: str, request: StateRequest) -> AsyncGenerator[bytes, None]:
        handler = await self._network.deliver(self._name, peer)
        async for chunk in handler.on_fetch(self._name, request):
            await self._network.pass_wire(peer, self._name)
            yield chunk

    async def exchange(self, peer: str, header: GroupHeader, chunks: Iterable[bytes]) -> Receipt:
        handler = await self._network.deliver(self._name, peer)
        receipt = await handler.on_group_message(self._name, header, _stream(chunks))
        await self._network.pass_wire(peer, self._name)
        return receipt


async def _stream(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
