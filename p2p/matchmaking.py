"""The group that averages in this round, as one node sees it: those there, those left out, the attempt that is on.

Any member may call a group together, by convention the first one that is there; of two calls the higher attempt counts,
and of two with one number that of the member who comes first in the roster. Bookkeeping shared by the node's loop and
its answering side; knows no network. A refusal is a ProtocolError in words, a message too early PeerUnreachable.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from core_training.foundation.errors import ProtocolError
from core_training.foundation.foreign_text import harmless
from core_training.runs import events
from core_training.runs.run_folder import Listener
from p2p.messages import GroupHeader, PeerMessage
from p2p.opened_sum import OpenedSum
from p2p.plan import RunPlan
from p2p.transport import PeerUnreachable
from security.secure_aggregation.group import Group, GroupAttempt, GroupFault, Phase, RingForm
from strategies.ring_scale import Scale

_ATTEMPTS_A_MEMBER = 3
"""Attempts in one round, for each member of the roster: each fault of a member ends at most one or two."""

_UNKNOWN = ""
"""The session of a peer that has not told it."""


class GaveUp(PeerMessage):
    """The reason of an attempt's failure, and the member at fault."""

    member: str | None
    reason: str


@dataclass(frozen=True)
class RoundInput:
    """A node's input to the groups of one round."""

    round: int
    proposal: bytes
    form: RingForm


class Matchmaking:
    """One node's view, for all rounds of a run. `news` is called whenever the node's loop should look again."""

    def __init__(self, plan: RunPlan, opened: OpenedSum, event: Listener, news: Callable[[], None]) -> None:
        self._plan = plan
        self._opened = opened
        self._event = event
        self._news = news
        self._input: RoundInput | None = None
        self._here: dict[int, dict[str, str]] = {}
        self._rank = (0, 0)
        self.session = os.urandom(16)
        """The mark of this start, unlike an earlier one's."""
        self.attempt: GroupAttempt | None = None
        """The newest attempt; it is over when `failure` is set."""
        self.failure: GaveUp | None = None
        self.failed_here = False
        """Whether the others have yet to be told of the failure."""
        self.attempts = 0
        self.left_out: dict[str, str] = {}
        """Peers not asked into this round's groups any more, and why."""
        self.passed_over: set[str] = set()
        """Members that were to call a group, and did not."""
        self.heard_at = 0.0
        """The last arrival in an attempt, on the event loop's clock."""

    @property
    def round(self) -> int:
        """The round for which this node waits in groups; 0 while it does something else."""
        return self._input.round if self._input else 0

    @property
    def must_be(self) -> tuple[str, ...] | None:
        """The only members with which this node averages in this round, once it has opened a sum of theirs; nobody in
        a round before that."""
        return self._opened.members(self.round)

    @property
    def must_have(self) -> Scale | None:
        """The only scale on which this node writes its update in this round, once it has opened a sum."""
        return self._opened.scale(self.round)

    @property
    def may_try_again(self) -> bool:
        """Whether another attempt at this round may be made."""
        return self.attempts < self._most_attempts

    @property
    def _most_attempts(self) -> int:
        return _ATTEMPTS_A_MEMBER * len(self._plan.roster)

    def begin(self, brought: RoundInput) -> None:
        """Wait in this round's groups, now trained."""
        self._input = brought
        self._rank = (0, 0)
        self.attempt, self.failure, self.attempts = None, None, 0
        self.left_out, self.passed_over = {}, set()
        self._here = {number: peers for number, peers in self._here.items() if number >= brought.round}

    def propose(self, proposal: bytes) -> None:
        """Bring another proposal to the next attempts."""
        assert self._input is not None
        self._input = replace(self._input, proposal=proposal)

    def end(self) -> None:
        """End the round at this node."""
        self._input, self.attempt = None, None

    def is_here(self, peer: str) -> bool:
        """Whether a peer waits for a group in this round."""
        return peer in self._here.get(self.round, {})

    def heard_here(self, sender: str, number: int, session: str) -> bool:
        """Note that a peer waits for a group; returns whether this node does, too. A peer that was started again has
        lost its attempt."""
        before = self._here.setdefault(number, {}).get(sender, _UNKNOWN)
        self._here[number][sender] = session
        if number == self.round and before not in (_UNKNOWN, session):
            # The fault was that of its earlier start.
            self.left_out.pop(sender, None)
            if self.is_on() and sender in self._members:
                self.fail(None, f"'{sender}' was started again")
        self._news()
        return number == self.round

    def known_here(self, peer: str, number: int) -> None:
        """Note a peer's answer that it waits for a group there."""
        self._here.setdefault(number, {}).setdefault(peer, _UNKNOWN)
        self._news()

    def gone(self, peer: str) -> None:
        """Forget a peer that is down, until it says it is back."""
        for peers in self._here.values():
            peers.pop(peer, None)

    def is_on(self) -> bool:
        """Whether an attempt has neither failed nor ended."""
        return self.attempt is not None and self.attempt.phase is not None and self.failure is None

    def call_together(self, members: tuple[str, ...]) -> None:
        """Begin an attempt with these members."""
        self._start(Group(self._plan.run_id, self.round, self._rank[0] + 1, members))

    def is_current(self, sender: str, header: GroupHeader) -> bool:
        """Whether a message, of which no byte has been read, belongs to the attempt that is on; False when it is stale.

        Begins the attempt that it calls for.
        """
        if header.round != self.round:
            raise PeerUnreachable(f"this node does not wait for a group in round {header.round} yet")
        group = _group_of(header)
        if sender not in group.members:
            raise ProtocolError("the sender is not of that group")
        if self.attempt is None or self.attempt.group != group:
            # Ranks only grow, so that all nodes keep the same one of two calls that cross.
            if self._rank_of(group) <= self._rank:
                self._notice_split(sender, group)
                return False
            self._check_call(sender, header, group)
            self._start(group)
        assert self.attempt is not None
        # Checked before a byte is read: a false size must not cost memory.
        most = 4096 if header.phase == "gave up" else self.attempt.most_bytes(Phase(header.phase), sender)
        if header.size > most:
            reason = f"{header.size} bytes in phase '{header.phase}'; the most is {most}"
            self.refuse(sender, header, reason)
            raise ProtocolError(reason)
        return self.is_on() or header.phase == "gave up"

    def refuse(self, sender: str, header: GroupHeader, reason: str) -> None:
        """Fail the attempt of a message that was not what it should be."""
        if self.is_on() and self._is_of_attempt(header):
            self.fail(sender, reason)

    def take(self, sender: str, header: GroupHeader, payload: bytes) -> None:
        """Take a whole message. Raises ProtocolError when the sender is to blame for its fault."""
        attempt = self.attempt
        if attempt is None or not self._is_of_attempt(header):
            return  # it was on when the message began to come
        if header.phase == "gave up":
            self._heed(sender, payload)
            return
        if not self.is_on():
            return
        try:
            attempt.take(sender, Phase(header.phase), payload)
        except GroupFault as fault:
            self.fail(fault.member, str(fault))
            # A sender whose message shows another's fault did nothing wrong, and is not refused.
            if fault.member == sender:
                raise
        self._news()

    def fail(self, member: str | None, reason: str) -> None:
        """End the attempt; `member` is to blame and left out of the next."""
        assert self.attempt is not None
        if member is not None and member != self._plan.name:
            # The first reason stands: later ones often follow from it.
            self.left_out.setdefault(member, reason)
        self.failure, self.failed_here = GaveUp(member=member, reason=reason[:1000]), True
        group = self.attempt.group
        self._event(events.GroupFailed(round=group.round, attempt=group.attempt, member=member, reason=reason))
        self._news()

    def bind(self, scale: Scale) -> None:
        """Bind this node, before it opens the attempt's sum, to just these members and this scale in this round.

        The same members' sum again says nothing new. That of fewer would, less this one, show who is missing; and on
        another scale weights are cut elsewhere: two sums of the same updates, weighted otherwise, give each of two.
        """
        self._opened.note(self.round, self._members, scale)

    @property
    def _members(self) -> tuple[str, ...]:
        return self.attempt.group.members if self.attempt else ()

    def _is_of_attempt(self, header: GroupHeader) -> bool:
        return self.attempt is not None and self.attempt.group == _group_of(header)

    def _heed(self, sender: str, payload: bytes) -> None:
        """Heed a member that gave up. One left out blames nobody."""
        try:
            told = GaveUp.model_validate_json(payload)
        except ValueError:
            told = GaveUp(member=sender, reason="garbage")
        reason = harmless(told.reason)
        blamed = told.member if told.member in self._members and sender not in self.left_out else None
        if self.is_on():
            self.fail(blamed, f"'{sender}' gave up: {reason}")
            self.failed_here = False
        elif blamed is not None and blamed != self._plan.name:
            self.left_out.setdefault(blamed, reason)

    def _notice_split(self, sender: str, group: Group) -> None:
        """Fail the attempt when a member was called to it with other members: the caller of both lied."""
        if self._rank_of(group) == self._rank and self.is_on() and sender in self._members:
            self.fail(group.members[0], f"it called '{sender}' together with others than this node")

    def _check_call(self, sender: str, header: GroupHeader, group: Group) -> None:
        """Raise for an attempt, new to this node, that it takes no part in."""
        roster, members = self._plan.roster, group.members
        if header.phase != Phase.KEYS.value:
            raise PeerUnreachable(f"this node has not begun attempt {group.attempt} of round {group.round} yet")
        if self.is_on() and sender not in self._members:
            raise PeerUnreachable("this node is in another group at the moment")
        if members != tuple(name for name in roster if name in members):
            raise ProtocolError("the members are not of the roster, or not in its order")
        if self._plan.name not in members:
            raise ProtocolError("this node is not of that group")
        if len(members) < self._plan.needed:
            raise ProtocolError(f"a group of {len(members)}; this node takes part from {self._plan.needed} members on")
        if self.must_be not in (None, members):
            raise ProtocolError("this node has opened a sum of other members in this round")
        if sender in self.left_out:
            raise PeerUnreachable(f"'{sender}' is left out, and begins nothing here: {self.left_out[sender]}")
        if members[0] in self.left_out:
            raise ProtocolError(f"'{members[0]}' called together: {self.left_out[members[0]]}")
        if not self.may_try_again:
            raise ProtocolError(f"{self.attempts} attempts at round {group.round} have failed here")
        # A call with a huge number would outrank all that honest members can make.
        if group.attempt > self._rank[0] + self._most_attempts:
            raise ProtocolError(f"attempt {group.attempt}; the last one here was {self._rank[0]}")

    def _rank_of(self, group: Group) -> tuple[int, int]:
        roster, first = self._plan.roster, group.members[0]
        # A caller who is not of the roster ranks below all members.
        return group.attempt, -roster.index(first) if first in roster else -len(roster)

    def _start(self, group: Group) -> None:
        assert self._input is not None
        if self.is_on():
            self.fail(None, f"attempt {group.attempt} has begun")
        self.attempts += 1
        self._rank = self._rank_of(group)
        masked = self._plan.recipe.privacy.secure is not None
        self.failure = None
        self.attempt = GroupAttempt(self._plan.name, group, self._input.proposal, self._input.form, masked=masked)
        self._event(events.GroupFormed(round=group.round, attempt=group.attempt, members=list(group.members)))
        self._news()


def _group_of(header: GroupHeader) -> Group:
    return Group(header.run_id, header.round, header.attempt, tuple(header.members))
