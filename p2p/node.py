"""A gossip node: trains, exchanges updates with its peers, averages, commits, and goes on to the next round.

It never waits for ever: not for a peer that is down, not for a slow one, not for itself (a node that came late takes
the others' state and goes on in step with them). Knows neither gRPC nor the trainer: the network is a `Transport`, the
trainer answers orders. All its times are the event loop's, so that a simulation can give it another clock.
"""

from __future__ import annotations

import asyncio
import hashlib

from core_training.foundation.errors import InputError, ProtocolError, RunError
from core_training.foundation.state import TrainableState
from core_training.runs import events
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

LINGER_SECONDS = 30.0
"""Seconds that a node stays for late ones."""

_PROBED_AT_ONCE = 8


async def take_part(
    plan: RunPlan,
    service: PeerService,
    transport: Transport,
    ask: Ask,
    folder: RunFolder,
    linger: float = LINGER_SECONDS,
) -> NodeResult:
    """Run one node from where it stood to the run's end, and a little longer for those who are late.

    `service` is what the network hands the peers' calls to. Raises RunError when the site cannot train, and
    InputError when nobody trains the same thing.
    """
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
        return await GossipNode(progress, calls, site, folder, began).run(linger)
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

    async def run(self, linger: float) -> NodeResult:
        """Take part until the last round, then stay for up to `linger` seconds."""
        if not self._judgement.has_ended():
            await self._gather()
        while not self._judgement.has_ended():
            if not self._catch_up.is_behind() or not await self._catch_up.adopt_newest():
                await self._round(self._progress.last.round + 1)
        await self._catch_up.settle()
        result = await self._conclude()
        await self._linger(linger)
        return result

    async def _gather(self) -> None:
        """Wait for all of the roster, unless the run is under way without this node."""
        members, deadline = self._progress.members, self._now() + self._plan.recipe.topology.round_deadline
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
            await asyncio.sleep(RETRY_SECONDS)
        if members.others and not members.live and members.differences():
            raise InputError("no peer trains the same thing: " + "; ".join(members.differences()))
        self._progress.event(events.Gathered(live=list(members.live), missing=list(missing)))

    async def _round(self, number: int) -> None:
        """Train, exchange, average, commit."""
        progress, needed = self._progress, self._plan.needed
        progress.begin(number, self._now())
        self._calls.begin(self._calls.greet_all(self._some_peers(number)))
        update = await self._site.train(number, progress.last.state, progress.manifest.digest)
        state = self._trained_state(update)
        progress.ledger.take(update)
        progress.arrived(self._now())
        if self._plan.in_groups:
            await self._average_in_group(update, state)
            return
        self._judgement.take(number, update.evaluation.loss if update.evaluation else None, progress.last.state)
        payload, state = progress.codec.write(update, state)
        partners = [peer for peer in self._plan.neighbours if progress.members.is_live(peer)]
        own = Contribution(self._plan.name, state, update.weight, len(partners), self._judgement.wants_to_stop)
        if await self._exchange(number, own, payload, partners) and await self._catch_up.adopt_newest():
            return
        others = self._sound_updates(number)
        if (present := self._present(number)) < needed:
            self._progress.event(events.TooFewMembers(round=number, present=present, needed=needed))
            self._commit(events.NodeRoundVoid, update, state, [own.name])
        else:
            mixed = self._plan.mixing.mix(own, others, self._plan.roster)
            self._judgement.agree(other.wants_to_stop for other in others)
            self._commit(events.NodeRound, update, mixed, sorted([own.name, *(other.name for other in others)]))

    async def _average_in_group(self, update: Update, trained: TrainableState) -> None:
        """Exchange in a group and commit. A round without a group leaves the state as it was."""
        start = self._progress.start
        if (
            not self._catch_up.is_behind()
            and (averaged := await self._groups.average(update, trained, start)) is not None
        ):
            self._judgement.take(update.round, averaged.eval_loss, start)
            self._judgement.agree(())  # all members have the same loss before them
            self._commit(events.NodeRound, update, averaged.state, sorted(averaged.members), averaged.scale)
        elif not (self._catch_up.is_overtaken() and await self._catch_up.adopt_newest()):
            self._commit(events.NodeRoundVoid, update, start, [], self._progress.last.scale)

    def _sound_updates(self, number: int) -> list[Contribution]:
        """The round's updates; one whose change no training makes is refused by name, once."""
        progress, recipe = self._progress, self._plan.recipe
        for other in progress.inbox.take(number):
            try:
                check_change(recipe, recipe.topology.local_steps or 1, other.state, progress.start)
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
        """Send the update to all partners and wait for theirs. Returns whether the others went on without this node."""
        progress = self._progress
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
        next_probe = self._now() + PROBE_SECONDS
        while True:
            # Whoever came back in mid-round and sent its update gets ours, too.
            returned = [peer for peer in self._plan.neighbours if progress.inbox.has(number, peer)]
            for peer in dict.fromkeys([*partners, *returned]):
                if parcel.is_left_for(peer) and progress.members.is_live(peer):
                    self._calls.send(peer, parcel)
            if parcel.came_late:
                return True
            missing = [peer for peer in partners if self._is_awaited(peer, parcel)]
            enough = self._present(number) >= self._plan.needed
            if self._now() >= deadline or (enough and not missing):
                return False
            if self._now() >= next_probe:
                next_probe = self._now() + PROBE_SECONDS
                self._calls.begin(self._calls.greet_all(missing or self._some_peers(number)))
            await progress.news_until(min(deadline, next_probe))

    def _is_awaited(self, peer: str, parcel: Parcel) -> bool:
        """Whether this node still expects something from a peer in this round: its update, or its receipt for ours."""
        members, number = self._progress.members, parcel.header.round
        hello = members.hello_of(peer)
        if not members.is_live(peer) or hello is None or hello.catching_up or hello.committed > number:
            return False
        if hello.finished and hello.committed < number:  # it has stopped early
            return False
        return not (self._progress.inbox.settled(number, peer) and peer in parcel.receipts)

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
        self,
        kind: type[events.NodeRound],
        update: Update,
        state: TrainableState,
        contributors: list[str],
        scale: Scale | None = None,
    ) -> None:
        progress, evaluation = self._progress, update.evaluation
        self._end_lap()
        progress.ledger.void_rounds += kind is events.NodeRoundVoid
        progress.commit(state, contributors, scale)
        self._progress.event(
            kind(
                round=update.round,
                of=self._plan.rounds,
                loss=update.train.loss_mean,
                eval_loss=evaluation.loss if evaluation else None,  # of the state the round began with
                eval_weight=evaluation.weight if evaluation else 0,
                weight=update.weight,
                seconds=round(progress.seconds_into(update.round, self._now()), 3),
                contributors=contributors,
                live=list(progress.members.live),
                state_digest=progress.last.state_digest,
            )
        )
        self._judgement.committed()

    async def _conclude(self) -> NodeResult:
        """Evaluate the result, let the site keep it, and write the summary."""
        progress, state = self._progress, await self._judgement.result(self._site)
        progress.ledger.eval_last = await self._site.evaluate(state, progress.last.round, final=True)
        self._end_lap()
        result = NodeResult(
            name=self._plan.name,
            rounds=progress.last.round,
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
        """Stay for those who are late, until all have finished or the time is up."""
        members, deadline = self._progress.members, self._now() + seconds
        while self._now() < deadline:
            await self._calls.greet_all(members.others)
            hellos = [members.hello_of(peer) for peer in members.others if members.difference_of(peer) is None]
            if all(hello is not None and hello.finished for hello in hellos):
                return
            await asyncio.sleep(RETRY_SECONDS)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _end_lap(self) -> None:
        """Book the time since this was done last."""
        now = self._now()
        self._progress.ledger.seconds_total += now - self._lap_began
        self._lap_began = now
