"""The calling side of a node: greets peers, sends its update until it is taken, fetches a state from those who hold it.

Every call that fails is counted against the peer; a peer that fails too often in a row is left alone until it is
heard again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.runs import events
from p2p.messages import GroupHeader, Hello, Receipt, StateRequest, UpdateHeader
from p2p.progress import Progress
from p2p.remembered import apart
from p2p.transfer import split
from p2p.transport import PeerUnreachable, Transport
from strategies.bounds import check_distance
from strategies.outer_steps.outer_step import Memory

RETRY_SECONDS = 0.3
_ANSWERED_WITHIN = 1.0


@dataclass
class Parcel:
    """An update on its way: the peers it is being sent to, and the answers of those who have it (None: refused)."""

    header: UpdateHeader
    payload: bytes
    under_way: set[str] = field(default_factory=set)
    receipts: dict[str, Receipt | None] = field(default_factory=dict)

    def is_left_for(self, peer: str) -> bool:
        """Whether this peer is still to be sent it, or again."""
        return peer not in self.under_way and peer not in self.receipts

    @property
    def came_late(self) -> bool:
        """Whether a peer had the round behind it already, without this update."""
        number = self.header.round
        return any(answer and not answer.accepted and answer.committed >= number for answer in self.receipts.values())


class PeerCalls:
    """Calls from one node to its peers."""

    def __init__(self, transport: Transport, progress: Progress) -> None:
        self._transport = transport
        self._progress = progress
        self._greetings: dict[str, asyncio.Task[None]] = {}
        self._begun: set[asyncio.Task[None]] = set()

    async def greet(self, peer: str) -> None:
        """Exchange hellos with one peer."""
        progress = self._progress
        try:
            hello = await self._transport.greet(peer, progress.hello())
            if hello.sender != peer:
                raise ProtocolError(f"it says it is '{hello.sender}'")
        except PeerUnreachable as error:
            self._missed(peer, error)
        except ProtocolError as error:
            progress.event(events.Refused(peer=peer, reason=f"answer to a greeting: {error}"))
            self._missed(peer, error)
        else:
            progress.members.heard(hello, progress.hello(), asyncio.get_running_loop().time())
            progress.news.set()

    async def greet_all(self, peers: Sequence[str]) -> None:
        """Exchange hellos with several peers at once. One that does not answer at once holds up no other."""
        for peer in peers:
            if peer not in self._greetings:
                self._greetings[peer] = asyncio.create_task(self.greet(peer))
                self._greetings[peer].add_done_callback(partial(self._greeted, peer))
        if peers:
            await asyncio.wait([self._greetings[peer] for peer in peers], timeout=_ANSWERED_WITHIN)

    def _greeted(self, peer: str, _: asyncio.Task[None]) -> None:
        del self._greetings[peer]

    def begin(self, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Let a call go on while the node does something else."""
        task = asyncio.create_task(call)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return task

    async def close(self) -> None:
        """Give up the calls that are still under way."""
        tasks = [*self._greetings.values(), *self._begun]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def send(self, peer: str, parcel: Parcel) -> None:
        """Begin to send an update: again and again, while the peer lives and the round is not long over."""
        parcel.under_way.add(peer)
        self.begin(self._publish(peer, parcel))

    async def _publish(self, peer: str, parcel: Parcel) -> None:
        progress, number = self._progress, parcel.header.round
        try:
            while progress.last.round <= number and progress.members.is_live(peer):
                try:
                    receipt = await self._transport.publish(peer, parcel.header, split(parcel.payload))
                except PeerUnreachable as error:
                    self._missed(peer, error)
                    await asyncio.sleep(RETRY_SECONDS)
                    await self.greet(peer)
                except ProtocolError as error:
                    progress.event(events.UpdateNotTaken(peer=peer, round=number, reason=str(error)))
                    parcel.receipts[peer] = None
                    break
                else:
                    progress.ledger.bytes_up += len(parcel.payload)
                    parcel.receipts[peer] = receipt
                    break
        finally:
            parcel.under_way.discard(peer)
        progress.news.set()

    async def deliver(self, peer: str, header: GroupHeader, payload: bytes) -> Receipt | None:
        """Send a group message, again and again while the peer lives. None when it is down; ProtocolError: refused."""
        progress = self._progress
        while progress.members.is_live(peer):
            try:
                receipt = await self._transport.exchange(peer, header, split(payload))
            except PeerUnreachable as error:
                self._missed(peer, error)
                await asyncio.sleep(RETRY_SECONDS)
                await self.greet(peer)
            else:
                progress.ledger.bytes_up += len(payload)
                return receipt
        return None

    async def fetch(self, offers: Sequence[Hello]) -> tuple[TrainableState, Memory] | None:
        """The state that all of `offers` hold and what is remembered of it, from any of them: the next if one fails.

        What had come in by then is kept, so that the next donor goes on where the last one stopped. None when no
        donor had it whole and right.
        """
        progress = self._progress
        received = bytearray()
        for offer in offers:
            try:
                await self._receive(offer.sender, self._request_of(offer, len(received)), received)
                whole = TrainableState.from_bytes(bytes(received), progress.whole_manifest)
                if whole.digest != offer.state_digest:
                    raise ProtocolError("it is not the state with the digest that was offered")
                state, memory = apart(whole, progress.manifest, progress.remembers)
                check_distance(progress.plan.recipe, offer.committed, state, progress.initial)
                if not whole.is_finite():
                    raise ProtocolError("what is remembered with it holds NaN or infinite values")
            except PeerUnreachable as error:
                self._missed(offer.sender, error)
            except ProtocolError as error:
                progress.event(events.Refused(peer=offer.sender, round=offer.committed, reason=f"state: {error}"))
                received.clear()
            else:
                progress.ledger.bytes_down += len(received)
                return state, memory
        return None

    def _request_of(self, offer: Hello, offset: int) -> StateRequest:
        """The request for an offered state. Raises ProtocolError for an offer that names none."""
        progress = self._progress
        return StateRequest.read(
            {
                "run_id": progress.plan.run_id,
                "sender": progress.plan.name,
                "round": offer.committed,
                "manifest_digest": progress.manifest.digest,
                "state_digest": offer.state_digest,
                "offset": offset,
            }
        )

    def _missed(self, peer: str, error: Exception) -> None:
        self._progress.members.missed(peer, str(error), asyncio.get_running_loop().time())

    async def _receive(self, donor: str, request: StateRequest, received: bytearray) -> None:
        most = self._progress.whole_manifest.max_message_bytes
        async with aclosing(self._transport.fetch(donor, request)) as chunks:
            async for chunk in chunks:
                if len(received) + len(chunk) > most:
                    raise ProtocolError(f"it is longer than {most} bytes, the most that a state takes")
                received += chunk
