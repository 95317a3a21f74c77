"""The answering side of a node: greets, takes in updates, hands out states; refuses what is wrong and says why.

Every sender named here is the one that the transport authenticated. A refusal is an event, never the end of a round.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

from core_training.foundation.errors import ProtocolError
from core_training.runs import events
from p2p.matchmaking import Matchmaking
from p2p.messages import GroupHeader, Hello, Receipt, StateRequest, UpdateHeader
from p2p.progress import Progress
from p2p.transfer import collect
from p2p.transport import PeerUnreachable

_ROUNDS_AHEAD = 2
"""Updates are taken of the round after the last commit, and of the one after that from nodes that are ahead."""

_UPLOADS_AT_ONCE = 2
"""Updates that one sender may be sending at a time: bounds the memory that it can take."""


class PeerService:
    """The `Handler` of a node. Until the node has opened it, callers hear that the node is still starting."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._uploads: Counter[str] = Counter()

    def open(self, progress: Progress) -> None:
        """Answer for this node from now on."""
        self._progress = progress

    async def on_greeting(self, sender: str, hello: Hello) -> Hello:
        progress = self._opened()
        try:
            _check_known(progress, sender)
            if hello.sender != sender:
                raise ProtocolError(f"it says it is '{hello.sender}'")
        except ProtocolError as error:
            progress.event(events.Refused(peer=sender, reason=f"greeting: {error}"))
            raise
        progress.members.heard(hello, progress.hello(), asyncio.get_running_loop().time())
        progress.news.set()
        return progress.hello()

    async def on_update(self, sender: str, header: UpdateHeader, chunks: AsyncIterator[bytes]) -> Receipt:
        progress = self._opened()
        try:
            hello = _check_exchanges(progress, sender)
            if progress.plan.in_groups:
                raise ProtocolError("this run's updates go to a group")
            progress.inbox.check_header(sender, header, hello)
            if (receipt := self._out_of_turn(progress, sender, header)) is not None:
                return receipt
            payload = await self._upload(progress, sender, header, chunks)
            if (receipt := self._out_of_turn(progress, sender, header)) is not None:
                return receipt
            progress.inbox.put(header, payload)
        except ProtocolError as error:
            progress.event(events.Refused(peer=sender, round=header.round, reason=f"update: {error}"))
            if progress.last.round < header.round <= progress.last.round + _ROUNDS_AHEAD:
                progress.inbox.refuse(header.round, sender)
                progress.news.set()
            raise
        progress.ledger.bytes_down += len(payload)
        progress.arrived(asyncio.get_running_loop().time())
        return Receipt(accepted=True, committed=progress.last.round)

    async def on_group_message(self, sender: str, header: GroupHeader, chunks: AsyncIterator[bytes]) -> Receipt:
        progress = self._opened()
        try:
            _check_exchanges(progress, sender)
            if header.sender != sender:
                raise ProtocolError(f"it says it comes from '{header.sender}'")
            if header.run_id != progress.plan.run_id or not progress.plan.in_groups:
                raise ProtocolError("it belongs to another run")
            if (receipt := self._out_of_turn(progress, sender, header)) is not None:
                return receipt
            accepted = await self._take_group_message(progress, sender, header, chunks)
        except ProtocolError as error:
            progress.event(events.Refused(peer=sender, round=header.round, reason=f"{header.phase}: {error}"))
            raise
        if not accepted and header.phase != "here":
            reason = f"{header.phase}: stale, of attempt {header.attempt}"
            progress.event(events.Refused(peer=sender, round=header.round, reason=reason))
        return Receipt(accepted=accepted, committed=progress.last.round)

    async def _take_group_message(
        self, progress: Progress, sender: str, header: GroupHeader, chunks: AsyncIterator[bytes]
    ) -> bool:
        """Take a message; returns whether its attempt is on; `here`: whether this node waits for a group, too."""
        matchmaking = progress.matchmaking
        if header.phase == "here":
            if header.size != len(matchmaking.session):
                raise ProtocolError(f"{header.size} bytes where {len(matchmaking.session)} are right")
            await self._upload(progress, sender, header, chunks)
            progress.arrived(asyncio.get_running_loop().time())
            return matchmaking.heard_here(sender, header.round, header.sha256)
        if not matchmaking.is_current(sender, header):
            return False
        try:
            payload = await self._upload(progress, sender, header, _noted(chunks, matchmaking))
        except ProtocolError as error:
            matchmaking.refuse(sender, header, str(error))
            raise
        progress.ledger.bytes_down += len(payload)
        matchmaking.take(sender, header, payload)
        return True

    async def on_fetch(self, sender: str, request: StateRequest) -> AsyncIterator[bytes]:
        progress = self._opened()
        try:
            _check_known(progress, sender)
            if request.sender != sender:
                raise ProtocolError(f"it says it comes from '{request.sender}'")
            if request.run_id != progress.plan.run_id or request.manifest_digest != progress.manifest.digest:
                raise ProtocolError("it asks for the state of another run")
            for chunk in progress.store.read(request.round, request.offset):
                progress.ledger.bytes_up += len(chunk)
                yield chunk
        except ProtocolError as error:
            progress.event(events.Refused(peer=sender, round=request.round, reason=f"request: {error}"))
            raise

    def on_malformed(self, sender: str, reason: str) -> None:
        if self._progress is not None:
            self._progress.event(events.Refused(peer=sender, reason=reason))

    def _opened(self) -> Progress:
        if self._progress is None:
            raise PeerUnreachable("this node is still starting")
        return self._progress

    def _out_of_turn(self, progress: Progress, sender: str, header: UpdateHeader | GroupHeader) -> Receipt | None:
        """The answer to an update that is too late or too early; None when it is expected."""
        committed = progress.last.round
        if committed < header.round <= committed + _ROUNDS_AHEAD:
            return None
        if header.round == committed and sender in progress.last.contributors:
            waits = isinstance(header, GroupHeader) and header.phase == "here"  # for a group, in which this node is not
            return Receipt(accepted=not waits, committed=committed)
        if header.round == committed:
            now = asyncio.get_running_loop().time()
            progress.deadlines.observe_late(progress.seconds_into(committed, now))
        reason = f"update: stale or early, of round {header.round}; this node has committed {committed}"
        progress.event(events.Refused(peer=sender, round=header.round, reason=reason))
        return Receipt(accepted=False, committed=committed)

    async def _upload(
        self, progress: Progress, sender: str, header: UpdateHeader | GroupHeader, chunks: AsyncIterator[bytes]
    ) -> bytes:
        if self._uploads[sender] >= _UPLOADS_AT_ONCE:
            raise PeerUnreachable(f"{_UPLOADS_AT_ONCE} updates of this sender are on their way already")
        self._uploads[sender] += 1
        try:
            async with asyncio.timeout(progress.plan.recipe.topology.round_deadline):
                return await collect(chunks, header.size, header.sha256)
        except TimeoutError:
            raise PeerUnreachable("the update did not come within topology.round_deadline") from None
        finally:
            self._uploads[sender] -= 1


async def _noted(chunks: AsyncIterator[bytes], matchmaking: Matchmaking) -> AsyncIterator[bytes]:
    """The chunks, each that holds something a sign that its sender is at work."""
    async for chunk in chunks:
        if chunk:
            matchmaking.heard_at = asyncio.get_running_loop().time()
        yield chunk


def _check_known(progress: Progress, sender: str) -> None:
    if sender not in progress.members.others:
        raise ProtocolError("the sender is not in the roster")


def _check_exchanges(progress: Progress, sender: str) -> Hello:
    """The newest greeting of a sender with whom this node exchanges updates. Raises ProtocolError for any other."""
    _check_known(progress, sender)
    if (hello := progress.members.hello_of(sender)) is None:
        raise PeerUnreachable("this node has not been greeted yet")
    if (differs := progress.members.difference_of(sender)) is not None:
        raise ProtocolError(differs)
    if sender not in progress.plan.neighbours:
        raise ProtocolError("the sender is no neighbour on topology.graph")
    return hello
