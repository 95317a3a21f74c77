"""A gossip node: trains, exchanges updates with its peers, averages, commits, and goes on to the next round.

It never waits for ever: not for a peer that is down, not for a slow one, not for itself (a node that came late takes
the others' state and goes on in step with them). Nor does it learn alone: a round for which too few came together is
void and changes nothing, and after three in a row the node ends. Knows neither gRPC nor the trainer: the network is a
`Transport`, the trainer answers orders. All its times are the event loop's, so that a simulation can give it another
clock.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from core_training.foundation.errors import InputError, ProtocolError, RunError, VoidRoundsError
from core_training.foundation.state import TrainableState
from core_training.recipe.recipe_keys import MOST_VOID_IN_A_ROW
from core_training.runs import events
from core_training.runs.figures import summary_of_void_rounds
from core_training.runs.run_folder import RunFolder
from p2p.calls import RETRY_SECONDS, Parcel, PeerCalls
from p2p.catch_up import CatchUp
from p2p.commits import CommitStore
from p2p.group_averaging import PROBE_SECONDS, GroupAveraging
from p2p.judgement import Judgement
from p2p.ledger import NodeResult, summarize
from p2p.messages import UpdateHeader
from p2p.plan import RunPlan
from p2p.progress import Progress
from p2p.service import PeerService
from p2p.site_orders import Ask, SiteOrders
from p2p.telling import Telling
from p2p.transport import Transport
from strategies.bounds import check_change
from strategies.messages import Update
from strategies.mixing import Contribution
from strategies.ring_scale import Scale

_LONGEST_PAUSE_FOR_PEERS = 2.0
"""Seconds between two looks for peers that have not come for a while."""

LINGER_SECONDS = 86_400.0
"""Seconds that a node which has finished hands out the result at most, while there is somebody without it."""

_LONGEST_PAUSE = 5.0
"""Seconds between two looks for those who are late, at most."""

_PROBED_AT_ONCE = 8


async def take_part(
    plan: RunPlan,
    service: PeerService,
    transport: Transport,
    ask: Ask,
    folder: RunFolder,
    linger: float = LINGER_SECONDS,
    on_result: Callable[[NodeResult], Awaitable[None]] | None = None,
) -> NodeResult:
    """Run one node from where it stood to the run's end, and on for up to `linger` seconds for those who are late.

    `service` is what the network hands the peers' calls to; `on_result` is told the result before the lingering, in
    which the site is asked nothing. Raises RunError when the site cannot train, VoidRoundsError when too few nodes came
    together, and InputError when nobody trains the same thing.
    """
    async with _joined(plan, service, transport, ask, folder) as node:
        return await node.run(linger, on_result)


async def fetch_result(
    plan: RunPlan, service: PeerService, transport: Transport, ask: Ask, folder: RunFolder, patience: float
) -> NodeResult:
    """Take the finished state from the members that have it, without training, and let the site keep it.

    Raises RunError when none hands it out within `patience` seconds.
    """
    async with _joined(plan, service, transport, ask, folder) as node:
        return await node.fetch(patience)


@asynccontextmanager
async def _joined(
    plan: RunPlan, service: PeerService, transport: Transport, ask: Ask, folder: RunFolder
) -> AsyncIterator[GossipNode]:
    began, site = asyncio.get_running_loop().time(), SiteOrders(plan, ask)
    tell = Telling(folder.event)
    joined = await site.join()
    initial = await site.initial_state(joined)
    progress = Progress(plan, joined, CommitStore(folder.checkpoints), tell, initial)
    tell(
        events.NodeJoined(
            site=plan.name,
            run=plan.run_id,
            committed=progress.last.round,
            manifest=progress.manifest.digest,
            initial=joined.initial_digest,
        )
    )
    service.open(progress)
    calls = PeerCalls(transport, progress)
    try:
        yield GossipNode(progress, calls, site, folder, began)
    finally:
        await calls.close()


class GossipNode:
    """One node that has joined a run. `began` is when it started, on the event loop's clock."""

    def __init__(self, progress: Progress, calls: PeerCalls, site: SiteOrders, folder: RunFolder, began: float) -> None:
        self._plan = progress.plan
        self._progress = progress
        self._calls = calls
        self._site = site
        self._catch_up = CatchUp(progress, calls)
        self._groups = GroupAveraging(progress, calls, self._catch_up)
        self._judgement = Judgement(progress, folder)
        self._folder = folder
        self._lap_began = began

    async def run(self, linger: float, on_result: Callable[[NodeResult], Awaitable[None]] | None = None) -> NodeResult:
        """Take part until the last round, then hand out the result for up to `linger` seconds, or until cancelled."""
        if not self._judgement.has_ended():
            await self._gather()
        while not self._judgement.has_ended():
            if not self._catch_up.is_behind() or not await self._catch_up.adopt_newest():
                self._check_void_rounds()
                await self._round(self._progress.last.round + 1)
        await self._catch_up.settle()
        result = await self._conclude()
        if on_result is not None:
            await on_result(result)
        with suppress(asyncio.CancelledError):  # nothing is left undone
            await self._linger(linger)
        return result

    async def fetch(self, patience: float) -> NodeResult:
        """Take the finished state as soon as members have it, for up to `patience` seconds, and conclude with it."""
        members, deadline = self._progress.members, self._now() + patience
        while self._progress.last.state is None or not self._judgement.has_ended():
            await self._calls.greet_all(members.others)
            has_result = any(hello.finished for hello in members.hellos())
            if has_result and self._catch_up.is_behind() and await self._catch_up.adopt_newest():
                continue
            if self._now() >= deadline:
                raise RunError(
                    f"no result was to be had within {patience:g} s: {'; '.join(map(self._where, members.others))}"
                )
            await asyncio.sleep(RETRY_SECONDS)
        await self._catch_up.settle()
        await self._calls.greet_all(members.others)  # those who hand it out wait to hear that this node has it
        return await self._conclude()

    def _where(self, peer: str) -> str:
        """How far a peer is, in words."""
        members = self._progress.members
        hello, differs = members.hello_of(peer), members.difference_of(peer)
        if hello is None or not (members.is_live(peer) or differs):
            return f"{peer} does not answer"
        return differs or f"{peer} {'has finished' if hello.finished else 'stands at'} round {hello.committed}"

    async def _gather(self) -> None:
        """Wait for all of the roster, unless the run is under way without this node."""
        members, began = self._progress.members, self._now()
        deadline = began + self._plan.recipe.topology.round_deadline
        announced: tuple[str, ...] | None = None
        while True:
            await self._calls.greet_all(members.others)
            missing = tuple(peer for peer in members.others if members.hello_of(peer) is None)
            under_way = any(hello.committed or hello.working for hello in members.hellos())
            if not missing or under_way or self._now() >= deadline:
                break
            if missing != announced:
                self._progress.event(events.WaitingForPeers(missing=list(missing)))
                announced = missing
            waited = self._now() - began
            await asyncio.sleep(min(max(RETRY_SECONDS, waited / 10), _LONGEST_PAUSE_FOR_PEERS))
        if members.others and not members.live and members.differences():
            raise InputError("no peer trains the same thing: " + "; ".join(members.differences()))
        self._progress.event(events.Gathered(live=list(members.live), missing=list(missing)))

    async def _round(self, number: int) -> None:
        """Train, exchange, average, commit."""
        progress = self._progress
        progress.begin(number, self._now())
        self._calls.begin(self._calls.greet_all(self._some_peers(number)))
        last = progress.last
        update = await self._site.train(number, last.state, progress.manifest.digest, last.void_rounds)
        state = self._trained_state(update)
        progress.arrived(self._now())
        if self._plan.in_groups:
            await self._average_in_group(update, state)
            return
        self._judgement.take(number, update.evaluation.loss if update.evaluation else None, progress.last.state)
        payload, state = progress.codec.write(update, state)
        partners = [peer for peer in self._plan.partners(number) if progress.members.is_live(peer)]
        own = Contribution(self._plan.name, state, update.weight, len(partners), self._judgement.wants_to_stop)
        if await self._exchange(number, own, payload, partners) and await self._catch_up.adopt_newest():
            return
        others = self._sound_updates(number)
        if self._can_count(number):
            mixed = self._plan.mixing.mix(own, others, self._plan.roster)
            self._judgement.agree(other.wants_to_stop for other in others)
            self._commit(update, mixed, sorted([own.name, *(other.name for other in others)]))
        else:
            present = self._present(number)
            self._progress.event(events.TooFewMembers(round=number, present=present, needed=self._plan.needed))
            self._hold_again(update)

    async def _average_in_group(self, update: Update, trained: TrainableState) -> None:
        """Exchange in a group and commit.

        A round without a group leaves the state as it was. It keeps its number, with a commit of its own: a sum of it
        may be known to somebody, and the same updates must not be in another.
        """
        start = self._progress.start
        if (
            not self._catch_up.is_behind()
            and (averaged := await self._groups.average(update, trained, start)) is not None
        ):
            self._judgement.take(update.round, averaged.eval_loss, start)
            self._judgement.agree(())  # all members have the same loss before them
            self._commit(update, averaged.state, sorted(averaged.members), averaged.scale)
        elif not (self._catch_up.is_overtaken() and await self._catch_up.adopt_newest()):
            self._end_lap()
            self._progress.ledger.take_void()
            self._progress.commit_void()
            self._tell(events.NodeRoundVoid, update)
            self._end_after_void_rounds()

    def _sound_updates(self, number: int) -> list[Contribution]:
        """The round's updates, each looked at once; one whose change no training makes is refused by name."""
        progress, recipe = self._progress, self._plan.recipe
        for other in progress.inbox.take_new(number):
            try:
                check_change(recipe, recipe.topology.most_local_steps or 1, other.state, progress.start)
            except ProtocolError as error:
                progress.event(events.Refused(peer=other.name, round=number, reason=f"update: {error}"))
                progress.inbox.drop(number, other.name)
        return progress.inbox.take(number)

    def _trained_state(self, update: Update) -> TrainableState:
        try:
            state = TrainableState.from_bytes(update.payload, self._progress.manifest)
        except ProtocolError as error:
            raise RunError(f"site '{self._plan.name}' trained something else than it was to: {error}") from None
        if not state.is_finite():
            raise RunError(f"site '{self._plan.name}' trained to NaN or infinite values: learning rate too high?")
        return state

    async def _exchange(self, number: int, own: Contribution, payload: bytes, partners: list[str]) -> bool:
        """Send the update to all partners and wait for theirs. Returns whether the others went on without this node.

        While too few have come for the round to count, whoever comes back is waited for until `round_deadline`.
        """
        progress, neighbours = self._progress, self._plan.partners(number)
        header = UpdateHeader(
            run_id=self._plan.run_id,
            round=number,
            sender=self._plan.name,
            manifest_digest=progress.manifest.digest,
            weight=own.weight,
            degree=own.degree,
            size=len(payload),
            sha256=hashlib.sha256(payload).hexdigest(),
            wants_to_stop=own.wants_to_stop,
        )
        parcel = Parcel(header, payload)
        trained_after = progress.seconds_into(number, self._now())
        deadline = self._now() + progress.deadlines.deadline(trained_after) - trained_after
        limit = max(deadline, self._now() + self._plan.recipe.topology.round_deadline)
        next_probe = self._now() + PROBE_SECONDS
        while True:
            enough, late = self._can_count(number), self._now() >= deadline
            # Whoever came back in mid-round and sent its update gets ours, too.
            returned = [peer for peer in neighbours if not enough or progress.inbox.has(number, peer)]
            for peer in dict.fromkeys([*partners, *returned]):
                if parcel.is_left_for(peer) and progress.members.is_live(peer):
                    self._calls.send(peer, parcel)
            if parcel.came_late or (late and not enough and self._catch_up.is_behind()):
                return True
            missing = [peer for peer in partners if self._is_awaited(peer, parcel)]
            if (enough and (late or not missing)) or self._now() >= limit:
                return False
            if late:
                progress.working = 0  # so that one who comes back begins the round, and does not sit it out
            if self._now() >= next_probe:
                next_probe = self._now() + PROBE_SECONDS
                in_vain = not enough and (late or not missing)
                doubtful = progress.members.others if in_vain else missing or self._some_peers(number)
                self._calls.begin(self._calls.greet_all(doubtful))
            await progress.news_until(min(limit if late else deadline, next_probe))

    def _is_awaited(self, peer: str, parcel: Parcel) -> bool:
        """Whether this node still expects something from a peer in this round: its update, or its receipt for ours."""
        number = parcel.header.round
        if not self._takes_part(peer, number):
            return False
        return not (self._progress.inbox.settled(number, peer) and peer in parcel.receipts)

    def _takes_part(self, peer: str, number: int) -> bool:
        """Whether a peer can still be in this round, so far as it has said."""
        hello = self._progress.members.hello_of(peer)
        if not self._progress.members.is_live(peer) or hello is None or hello.catching_up or hello.committed > number:
            return False
        return not (hello.finished and hello.committed < number)  # it has stopped early

    def _can_count(self, number: int) -> bool:
        """Whether enough members are in a round for it to count, one of whom has sent its update.

        Where a node has one partner at a time, that one may be away, or there may be none for its place.
        """
        needed, inbox = self._plan.needed, self._progress.inbox
        if self._present(number) < needed:
            return False
        if needed == 1 or inbox.take(number):
            return True
        return self._plan.one_at_a_time and not any(
            self._takes_part(peer, number) and not inbox.settled(number, peer) for peer in self._plan.partners(number)
        )

    def _present(self, number: int) -> int:
        """The number of members of a round: those in the mean or, where each has a mean of its own, those alive."""
        if self._plan.in_one_state:
            return 1 + len(self._sound_updates(number))
        return 1 + len(self._progress.members.live)

    def _some_peers(self, number: int) -> tuple[str, ...]:
        """A few peers to greet in this round, so that all are heard from now and then, whatever their number."""
        others = self._progress.members.others
        start = number * _PROBED_AT_ONCE % len(others) if len(others) > _PROBED_AT_ONCE else 0
        return (others[start:] + others[:start])[:_PROBED_AT_ONCE]

    def _commit(
        self, update: Update, state: TrainableState, contributors: list[str], scale: Scale | None = None
    ) -> None:
        """Commit a round that counts."""
        progress = self._progress
        self._end_lap()
        progress.ledger.take(update, is_first=progress.last.counted == 0)
        progress.commit(state, contributors, scale)
        self._tell(events.NodeRound, update, contributors)
        self._judgement.committed()

    def _hold_again(self, update: Update) -> None:
        """Leave the state as it was after a void round. It is held again: the site answers it with the same bytes."""
        self._end_lap()
        self._progress.ledger.take_void()
        self._progress.note_ledger()
        self._tell(events.NodeRoundVoid, update)
        self._end_after_void_rounds()

    def _end_after_void_rounds(self) -> None:
        """Raise VoidRoundsError after every third void round in a row."""
        progress, plan = self._progress, self._plan
        if progress.ledger.void_in_a_row % MOST_VOID_IN_A_ROW == 0:
            self._check_void_rounds()
            goes_on = f"the same command goes on after round {progress.last.round}"
            said = f"{MOST_VOID_IN_A_ROW} rounds in a row were void: it takes {plan.needed} nodes"
            raise self._void_rounds(said, goes_on)

    def _check_void_rounds(self) -> None:
        """Raise VoidRoundsError when the run has had as many void rounds as it may.

        By the way to this state, which others may have told, and by what this node has seen itself: nobody's word ends
        its run, nor do rounds that it had alone before it took the others' state.
        """
        progress, most = self._progress, self._plan.most_void_rounds
        if min(progress.last.void_rounds, progress.ledger.void_rounds) >= most:
            raise self._void_rounds(f"{most} rounds were void", "the most that this run may have")

    def _void_rounds(self, said: str, means: str) -> VoidRoundsError:
        """The error of a node that ends for void rounds, noted in its summary."""
        members, ledger = self._progress.members, self._progress.ledger
        missing = ", ".join(peer for peer in members.others if not members.is_live(peer))
        who = f"missing: {missing}" if missing else "all were there, and no round came together"
        message = f"'{self._plan.name}': {said}; {who} ({means})"
        error = VoidRoundsError(message, self._progress.last.counted, ledger.void_rounds)
        self._folder.write_summary(summary_of_void_rounds(self._plan.recipe, error))
        return error

    def _tell(self, kind: type[events.NodeRound], update: Update, contributors: Sequence[str] = ()) -> None:
        progress, evaluation = self._progress, update.evaluation
        progress.event(
            kind(
                round=update.round,
                of=self._plan.rounds,
                loss=update.train.loss_mean if update.train.weight else None,
                eval_loss=evaluation.loss if evaluation else None,  # of the state the round began with
                eval_weight=evaluation.weight if evaluation else 0,
                weight=update.train.weight,
                seconds=round(progress.seconds_into(update.round, self._now()), 3),
                contributors=list(contributors),
                live=list(progress.members.live),
                state_digest=progress.last.state_digest,
                rounds_done=progress.last.counted,
            )
        )

    async def _conclude(self) -> NodeResult:
        """Evaluate the result, let the site keep it, and write the summary."""
        progress, state = self._progress, await self._judgement.result(self._site)
        progress.ledger.eval_last = await self._site.evaluate(state, progress.last.round, final=True)
        self._end_lap()
        result = NodeResult(
            name=self._plan.name,
            rounds=progress.last.counted,
            last_round=progress.last.round,
            ledger=progress.ledger.copy(),
            data=progress.joined.data,
            parameters=state.manifest.size,
            initial_digest=progress.joined.initial_digest,
            state_digest=state.digest,
        )
        self._folder.write_summary(summarize(self._plan.recipe, [result]))
        self._progress.event(events.NodeCompleted(state_digest=state.digest, eval_loss=progress.ledger.eval_last.loss))
        return result

    async def _linger(self, seconds: float) -> None:
        """Stay and hand out the result to those who are late, until all have it or the time is up."""
        members, deadline, pause = self._progress.members, self._now() + seconds, RETRY_SECONDS
        told: list[str] = []
        while self._now() < deadline:
            await self._calls.greet_all(members.others)
            late = [peer for peer in members.others if members.difference_of(peer) is None and not self._has_it(peer)]
            if not late:
                return
            if late != told and pause > 1:  # not of those who are just about to finish
                self._progress.event(events.HandingOut(late=late))
                told = late
            pause = min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(min(pause, deadline - self._now()))

    def _has_it(self, peer: str) -> bool:
        hello = self._progress.members.hello_of(peer)
        return hello is not None and hello.finished

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _end_lap(self) -> None:
        """Book the time since this was done last."""
        now = self._now()
        self._progress.ledger.seconds_total += now - self._lap_began
        self._lap_began = now
