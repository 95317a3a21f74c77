"""The way of a node that is behind back in step with the others, and of all nodes to one state at the end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from core_training.runs import events
from p2p.calls import RETRY_SECONDS, PeerCalls
from p2p.commits import Commit
from p2p.messages import Hello, Offer
from p2p.progress import Progress

_FETCH_ATTEMPTS = 3
_JOINABLE_SHARE = 0.25
_JOINABLE_SECONDS = 1.0


class CatchUp:
    """A node's comparison with its neighbours: it adopts the state of one that is ahead."""

    def __init__(self, progress: Progress, calls: PeerCalls) -> None:
        self._progress = progress
        self._calls = calls
        self._plan = progress.plan
        self._doubted: set[str] = set()

    def is_behind(self) -> bool:
        """Whether the live neighbours have a state that this node should have."""
        return self._wanted() is not None

    def is_overtaken(self) -> bool:
        """Whether this node is behind, and not only behind nodes that found no group in this round."""
        wanted = self._wanted()
        return wanted is not None and wanted[:2] != (self._progress.last.round + 1, 0)

    async def adopt_newest(self) -> bool:
        """Take the newest state that a neighbour has, at a moment from which this node can go on with the others.

        Returns whether there was a newer one. In the middle of a round of the others this node sits out till its end.
        """
        progress, loop = self._progress, asyncio.get_running_loop()
        progress.catching_up = True
        until = loop.time() + self._plan.recipe.topology.round_deadline  # whatever they say about themselves
        # The others go on during a fetch, and may not keep the state that they offered.
        for _ in range(_FETCH_ATTEMPTS):
            await self._calls.greet_all(progress.members.live or self._plan.neighbours)
            while self._must_sit_out() and loop.time() < until:
                await asyncio.sleep(RETRY_SECONDS)
                await self._calls.greet_all(progress.members.live)
            if (wanted := self._wanted()) is None:
                break
            if await self._adopt(wanted):
                return True
        progress.catching_up = False
        return False

    async def settle(self) -> None:
        """Wait for those who are still averaging the last round; should states differ, agree on one of them.

        A kill or a cut in the middle of the last round can leave nodes with means over different members; in every
        earlier round the next mean mends that.
        """
        progress, loop = self._progress, asyncio.get_running_loop()
        progress.working, progress.catching_up = 0, False
        deadline = loop.time() + progress.deadlines.deadline(0.0)
        while loop.time() < deadline:
            await self._calls.greet_all(progress.members.live)
            if all(hello.committed >= progress.last.round for hello in progress.members.hellos()):
                break
            await asyncio.sleep(RETRY_SECONDS)
        if self._plan.in_one_state and (wanted := self._wanted(at_the_end=True)) is not None:
            await self._adopt(wanted)
        progress.finished = True

    def _wanted(self, *, at_the_end: bool = False) -> Offer | None:
        """The state to adopt, as it was offered; None where this node has it. At the end all are to have the same one.

        Otherwise it is one of a later round: the next mean brings together what differs. The members of a group must
        start from the very same state, which all who were in the last sum hold. So there it is the one that most hold,
        this node counted, of its own round or a later one, and which more than half of the fewest members hold, as they
        have confirmed it: a single node cannot put a state of its making in its place. (But where two are enough for a
        group, it can: there is but one to believe.)

        Nodes that stopped early, in an earlier round than this one's, have agreed on their state while it was cut off;
        they too are believed together only.
        """
        own, offers = self._progress.last.offer, [hello.offer for hello in self._hellos()]
        enough = self._plan.believed
        if at_the_end and self._plan.stops_early:
            stopped = Counter(hello.offer for hello in self._hellos() if hello.finished and hello.committed < own[0])
            if agreed := [offer for offer, holders in stopped.items() if holders >= enough]:
                return max(agreed)
        if self._plan.in_groups:
            holders = Counter([own, *offers])
            later = [offer for offer in holders if offer == own or (offer[0] >= own[0] and holders[offer] >= enough)]
            best = max(later, key=lambda offer: (holders[offer], offer))
            return best if best != own else None
        best = max(offers, default=own)
        return best if best[0] > own[0] or (at_the_end and best > own) else None

    def _must_sit_out(self) -> bool:
        """Whether the others are so far into a round that one who starts it now would come late."""
        hellos = self._hellos()
        newest = max((hello.committed for hello in hellos), default=0)
        longest = self._plan.recipe.topology.round_deadline
        if self._plan.in_groups and sum(hello.working > newest for hello in hellos) < self._plan.needed:
            return False  # they cannot end it without this node
        # A peer that claims to be at it for longer than a round can last holds nobody up.
        return any(
            hello.working > newest > 0
            and max(_JOINABLE_SECONDS, _JOINABLE_SHARE * hello.round_seconds) < hello.working_seconds < longest
            for hello in hellos
        )

    async def _adopt(self, offer: Offer) -> bool:
        """Fetch the state of an offer and commit it as one's own."""
        progress = self._progress
        donors = [hello for hello in self._hellos() if hello.offer == offer]
        fetched = await self._calls.fetch(donors)
        if fetched is None:
            return False
        state, memory = fetched
        # The state is the donors'; the account stays this node's own, and the rounds that it had alone are behind it.
        number = max(offer[0], progress.last.round)
        progress.ledger.void_in_a_row = 0
        void_rounds = number - offer[0] + _void_rounds(donors)
        contributors = tuple(donors[0].contributors)
        progress.put(Commit(number, state, memory, contributors, progress.ledger.copy(), void_rounds=void_rounds))
        progress.event(
            events.Adopted(
                round=number,
                of=self._plan.rounds,
                donors=[donor.sender for donor in donors],
                state_digest=progress.last.state_digest,
                rounds_done=progress.last.counted,
            )
        )
        return True

    def _hellos(self) -> list[Hello]:
        """The live neighbours' last hellos, but for those that say what cannot be."""
        hellos = [hello for hello in self._progress.members.hellos() if hello.sender in self._plan.neighbours]
        return [hello for hello in hellos if self._is_possible(hello)]

    def _is_possible(self, hello: Hello) -> bool:
        """Whether a run can stand where a peer says it stands. One that says what cannot be is told once by name."""
        doubt = self._plan.doubt(hello.committed, hello.void_rounds)
        if doubt is not None and hello.sender not in self._doubted:
            self._doubted.add(hello.sender)
            self._progress.event(events.Refused(peer=hello.sender, round=hello.committed, reason=f"offer: {doubt}"))
        return doubt is None


def _void_rounds(donors: Sequence[Hello]) -> int:
    """The void rounds on the way to a state, as most of those say who hold it: one by itself is not believed."""
    ((said, _),) = Counter(donor.void_rounds for donor in donors).most_common(1)
    return said
