"""Averages with the other nodes in a group, so that they learn the sum of the updates and none by itself.

Waits for the others, calls a group together or follows a call, and takes one attempt after another through its phases
until there is a sum. Waits for nobody for ever: a member that is down, silent or at fault ends the attempt, and is
left out of the next. Knows no model; what an attempt is stands in `security.secure_aggregation.group`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.runs import events
from p2p.calls import RETRY_SECONDS, PeerCalls
from p2p.catch_up import CatchUp
from p2p.deadlines import Deadlines
from p2p.group_update import GroupUpdate
from p2p.matchmaking import RoundInput
from p2p.messages import GroupHeader, GroupPhase
from p2p.progress import Progress
from security.secure_aggregation.group import GroupAttempt, GroupFault, Phase
from strategies.figures import RoundFigures
from strategies.messages import Update
from strategies.ring_scale import Scale

PROBE_SECONDS = 1.0
_CALLED_WITHIN = 10.0
"""Seconds to wait for the member whose turn it is to call a group together."""


@dataclass(frozen=True)
class Averaged:
    """The state after a round, the members in the mean, and the limits to write the next updates with.

    `eval_loss` is the members' held-out loss of the state that the round began with; None where none was measured.
    """

    state: TrainableState
    members: tuple[str, ...]
    scale: Scale
    eval_loss: float | None


class GroupAveraging:
    """One node's exchanges in groups, round after round."""

    def __init__(self, progress: Progress, calls: PeerCalls, catch_up: CatchUp) -> None:
        self._plan = progress.plan
        self._progress = progress
        self._matchmaking = progress.matchmaking
        self._calls = calls
        self._catch_up = catch_up
        # One for each phase: a phase that moves vectors takes longer than one that moves keys.
        self._deadlines = {phase: Deadlines(self._plan.recipe.topology.round_deadline) for phase in Phase}
        self._told: set[str] = set()
        self._sending: list[asyncio.Task[None]] = []
        self._next_probe = 0.0

    async def average(self, update: Update, trained: TrainableState, start: TrainableState) -> Averaged | None:
        """The mean over a group of this round's updates. None when there is no group, or it went on without this node.

        Raises RunError when an update cannot be written, as one with NaN.
        """
        progress, matchmaking = self._progress, self._matchmaking
        own = GroupUpdate(progress, update, trained, start)
        self._cancel_calls()
        self._told = set()
        matchmaking.begin(RoundInput(update.round, own.proposal, own.form))
        if matchmaking.must_have is not None:  # it was killed after it had opened a sum of this round
            self._hold(own, matchmaking.must_have)
        # The deadline counts from the round's begin, as it was learned; the limit from now, however long training took.
        trained_after = progress.seconds_into(update.round, self._now())
        self._deadline = self._now() + progress.deadlines.deadline(trained_after) - trained_after
        self._limit = self._now() + self._plan.recipe.topology.round_deadline
        try:
            while (attempt := await self._next_attempt()) is not None:
                if await self._carry_out(attempt, own):
                    return self._read(attempt, own)
            return None
        finally:
            matchmaking.end()

    def _read(self, attempt: GroupAttempt, own: GroupUpdate) -> Averaged | None:
        group = attempt.group
        try:
            outcome, scale = own.read(attempt.total, len(group.members))
            eval_loss = RoundFigures.from_integers(outcome.figures).eval_loss
        except ProtocolError as error:  # the same at all members: they hold the same sum
            self._progress.event(events.Refused(peer=None, round=group.round, reason=f"sum: {error}"))
            return None
        self._progress.ledger.note_saturated(outcome.saturated)
        self._progress.event(
            events.GroupSum(
                round=group.round,
                attempt=group.attempt,
                members=list(group.members),
                masked=self._plan.recipe.privacy.secure is not None,
                saturated=outcome.saturated,
                capped=outcome.capped,
            )
        )
        return Averaged(outcome.state, group.members, scale, eval_loss)

    async def _next_attempt(self) -> GroupAttempt | None:
        """The attempt to carry out next, by this node's call or another's. None when there will be none."""
        matchmaking = self._matchmaking
        waited_for, since = self._plan.name, self._now()
        while True:
            self._tell_of_presence()
            if matchmaking.is_on():
                return matchmaking.attempt
            if self._catch_up.is_overtaken() or not matchmaking.may_try_again:
                return None
            if self._now() >= self._limit:
                self._tell_of_too_few()
                return None
            late, doubtful = self._now() >= self._deadline, self._awaited()
            # A call while somebody still trains would leave it out.
            if late or not doubtful:
                members = self._next_members()
                if members is None and not self._are_enough_left():
                    self._tell_of_too_few()
                    return None
                doubtful = doubtful or ([waited_for] if members else list(self._progress.members.others))
                if members is not None:
                    # The first in the roster calls, so that calls seldom cross; a silent caller is passed over.
                    caller = next(name for name in members if name not in matchmaking.passed_over)
                    if caller == self._plan.name:
                        matchmaking.call_together(members)
                        continue
                    # Each caller has its own time: a new one has not had its chance yet.
                    if caller != waited_for:
                        waited_for, since = caller, self._now()
                    elif self._now() - since >= _CALLED_WITHIN:
                        matchmaking.passed_over.add(caller)
                        continue
            await self._look_again(self._limit if late else self._deadline, doubtful)

    def _tell_of_too_few(self) -> None:
        """Say that no group came together, unless it was for another reason than that too few were there."""
        present, needed = len(self._present()), self._plan.needed
        if present < needed or self._matchmaking.must_be is not None:
            self._progress.event(events.TooFewMembers(round=self._matchmaking.round, present=present, needed=needed))

    def _present(self) -> tuple[str, ...]:
        """The nodes a group can have now, in roster order."""
        matchmaking, members = self._matchmaking, self._progress.members
        return tuple(
            name
            for name in self._plan.roster
            if name == self._plan.name
            or (matchmaking.is_here(name) and members.is_live(name) and name not in matchmaking.left_out)
        )

    def _next_members(self) -> tuple[str, ...] | None:
        """The members to call; None when they are too few."""
        present = self._present()
        if (must_be := self._matchmaking.must_be) is not None:
            return must_be if must_be and set(must_be) <= set(present) else None
        return present if len(present) >= self._plan.needed else None

    def _are_enough_left(self) -> bool:
        """Whether a group is still possible if every node comes that can."""
        if self._matchmaking.must_be is not None:
            return False
        gone = {peer for peer in self._progress.members.others if self._has_gone_on(peer)}
        return len(self._plan.roster) - len(gone | self._matchmaking.left_out.keys()) >= self._plan.needed

    def _awaited(self) -> list[str]:
        """Peers that still train this round, as far as is known."""
        matchmaking, members = self._matchmaking, self._progress.members
        awaited = []
        for peer in members.live:
            hello = members.hello_of(peer)
            # It comes in where the others are too few without it (`CatchUp._must_sit_out`): only then is it awaited.
            sits_out = hello is not None and hello.catching_up and len(self._present()) >= self._plan.needed
            if not (sits_out or self._has_gone_on(peer) or matchmaking.is_here(peer) or peer in matchmaking.left_out):
                awaited.append(peer)
        return awaited

    def _has_gone_on(self, peer: str) -> bool:
        """Whether a peer has this round behind it."""
        hello = self._progress.members.hello_of(peer)
        return hello is not None and hello.committed >= self._matchmaking.round

    async def _carry_out(self, attempt: GroupAttempt, own: GroupUpdate) -> bool:
        """Take an attempt through its phases; returns whether there is a sum in the end."""
        limit = (self._now() + self._limit) / 2  # a member that dribbles leaves time for an attempt without it
        while attempt.phase is not None:
            self._send(attempt)
            if not (await self._all_have_sent(attempt, limit) and self._go_on(attempt, own)):
                self._give_up(attempt)
                await self._hear_others()
                return False
        return True

    def _go_on(self, attempt: GroupAttempt, own: GroupUpdate) -> bool:
        """Take an attempt to its next phase; False when the members' messages do not fit together."""
        began = time.perf_counter()
        try:
            if attempt.phase is Phase.KEYS:
                vector = own.vector(attempt.proposals, self._matchmaking.must_have)
                began = time.perf_counter()
                attempt.scatter(vector)
            else:
                if attempt.phase is Phase.READY:
                    # First on disk: a node killed after it opened the sum must not average with others in this round.
                    self._matchmaking.bind(own.scale)
                    self._hold(own, own.scale)
                attempt.advance()
        except GroupFault as fault:
            self._matchmaking.fail(fault.member, str(fault))
            return False
        except ProtocolError as error:
            # The update did not fit the agreed scale: the next attempt gets a wider one, and nobody is to blame.
            if not own.widen():
                raise
            self._matchmaking.propose(own.proposal)
            self._matchmaking.fail(None, str(error))
            return False
        finally:
            self._progress.ledger.seconds_protection += time.perf_counter() - began
        return True

    def _hold(self, own: GroupUpdate, scale: Scale) -> None:
        """Propose this scale in every attempt that may follow."""
        own.hold(scale)
        self._matchmaking.propose(own.proposal)

    async def _all_have_sent(self, attempt: GroupAttempt, limit: float) -> bool:
        """Wait for the messages of a phase, until `limit` at most; False when the attempt is over."""
        matchmaking, members, began = self._matchmaking, self._progress.members, self._now()
        phase = attempt.phase
        assert phase is not None
        # Silence counts from here: before, this node may have been busy itself.
        matchmaking.heard_at = began
        while True:
            if matchmaking.attempt is not attempt or matchmaking.failure is not None:
                return False
            missing = attempt.missing
            if not missing:
                self._deadlines[phase].observe(self._now() - began)
                return True
            # Bytes that come move the deadline, for a slow line is not silence; the limit never moves.
            until = min(matchmaking.heard_at + self._deadlines[phase].deadline(0.0), limit)
            lost = [peer for peer in missing if self._now() >= until or not members.is_live(peer)]
            for peer in lost:
                if not members.is_live(peer):
                    # Until it says anew that it waits, the next attempt must not count on it.
                    matchmaking.gone(peer)
                try:
                    attempt.do_without(peer, f"'{peer}' is down or silent in phase '{phase}'")
                except GroupFault as fault:
                    # Who hears nothing of most others is cut off itself.
                    cut_off = 2 * len(lost) > len(attempt.group.members)
                    matchmaking.fail(None if cut_off else peer, str(fault))
            if not lost:
                await self._look_again(until, missing)

    def _send(self, attempt: GroupAttempt) -> None:
        assert attempt.phase is not None
        for peer in attempt.group.members:
            if peer != self._plan.name:
                payload = attempt.message_to(peer)
                header = self._header(attempt, attempt.phase.value, payload)
                self._begin(self._deliver(attempt, peer, header, payload))

    async def _deliver(self, attempt: GroupAttempt, peer: str, header: GroupHeader, payload: bytes) -> None:
        matchmaking = self._matchmaking
        blamed: str | None
        try:
            receipt = await self._calls.deliver(peer, header, payload)
        except ProtocolError as error:
            # One that does not begin the attempt is left out; in later phases it tells all whose fault it is.
            blamed, reason = peer if attempt.phase is Phase.KEYS else None, f"'{peer}' refused: {error}"
        else:
            if receipt is None or receipt.accepted:
                return
            # A peer that has the round behind it will not come back; any other may be in the next attempt.
            blamed = peer if receipt.committed >= header.round else None
            reason = f"'{peer}' is in this attempt no more"
        if matchmaking.attempt is attempt and matchmaking.is_on():
            matchmaking.fail(blamed, reason)

    def _give_up(self, attempt: GroupAttempt) -> None:
        """Stop an attempt's calls, and tell its members, who would wait in vain."""
        self._cancel_calls()
        failure = self._matchmaking.failure
        if self._matchmaking.attempt is not attempt or failure is None or not self._matchmaking.failed_here:
            return
        payload = failure.model_dump_json().encode()
        header = self._header(attempt, "gave up", payload)
        for peer in attempt.group.members:
            if peer != self._plan.name:
                self._begin(self._tell(peer, header, payload))

    async def _hear_others(self) -> None:
        """Ask the others after a failure who is alive and at fault, unless another attempt has begun."""
        if not self._matchmaking.is_on():
            await asyncio.sleep(RETRY_SECONDS)
            await self._calls.greet_all(self._progress.members.live)

    def _tell_of_presence(self) -> None:
        """Let each live peer know, once, that this node waits for a group."""
        matchmaking, members = self._matchmaking, self._progress.members
        # A peer that was down may have been started again and know nothing: it is told once more.
        self._told &= set(members.live)
        header = GroupHeader(
            run_id=self._plan.run_id,
            sender=self._plan.name,
            round=matchmaking.round,
            attempt=0,
            members=[],
            phase="here",
            size=len(matchmaking.session),
            sha256=hashlib.sha256(matchmaking.session).hexdigest(),
        )
        for peer in members.live:
            if peer not in self._told:
                self._told.add(peer)
                self._calls.begin(self._tell(peer, header, matchmaking.session))

    async def _tell(self, peer: str, header: GroupHeader, payload: bytes) -> None:
        try:
            receipt = await self._calls.deliver(peer, header, payload)
        except ProtocolError as error:
            self._progress.event(events.RefusedBy(peer=peer, round=header.round, reason=str(error)))
        else:
            if header.phase == "here" and receipt is not None and receipt.accepted:
                self._matchmaking.known_here(peer, header.round)

    async def _look_again(self, until: float, doubtful: list[str]) -> None:
        """Wait for news, and probe the doubtful peers for life now and then."""
        progress = self._progress
        if self._now() >= self._next_probe:
            self._next_probe = self._now() + PROBE_SECONDS
            self._calls.begin(self._calls.greet_all([peer for peer in doubtful if peer != self._plan.name]))
        await progress.news_until(min(until, self._next_probe))

    def _cancel_calls(self) -> None:
        for task in self._sending:
            task.cancel()
        self._sending.clear()

    def _begin(self, call: Coroutine[Any, Any, None]) -> None:
        self._sending.append(self._calls.begin(call))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _header(self, attempt: GroupAttempt, phase: GroupPhase, payload: bytes) -> GroupHeader:
        group = attempt.group
        return GroupHeader(
            run_id=group.run_id,
            sender=self._plan.name,
            round=group.round,
            attempt=group.attempt,
            members=list(group.members),
            phase=phase,
            size=len(payload),
            sha256=hashlib.sha256(payload).hexdigest(),
        )
