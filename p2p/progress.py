"""A node's progress: its training, its commits, its peers, the updates that came in. No network, no loop.

The node's loop and its answering side share one `Progress`; both run on one event loop, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from core_training import __version__
from core_training.foundation.state import TrainableState
from core_training.runs.run_folder import Listener
from p2p.commits import Commit, CommitStore
from p2p.deadlines import Deadlines
from p2p.inbox import Inbox
from p2p.matchmaking import Matchmaking
from p2p.membership import Membership
from p2p.messages import Hello
from p2p.neighbour_codec import NeighbourCodec
from p2p.opened_sum import OpenedSum
from p2p.plan import RunPlan
from p2p.remembered import together, whole_manifest
from strategies.messages import JoinReply
from strategies.outer_steps.outer_step import Memory, first_memory, outer_step_of, take_step
from strategies.ring_scale import Scale


class Progress:
    """The state of one node in one run. `initial` is the run's first state."""

    def __init__(
        self,
        plan: RunPlan,
        joined: JoinReply,
        store: CommitStore,
        event: Listener,
        initial: TrainableState,
    ) -> None:
        self.plan = plan
        self.joined = joined
        self.manifest = joined.parsed_manifest
        self.store = store
        self.event = event
        self.members = Membership(plan.name, plan.roster, event)
        self.initial = initial
        self.codec = NeighbourCodec(plan, self.manifest, initial)
        self.inbox = Inbox(plan.run_id, self.manifest, plan.recipe, self.codec)
        self.deadlines = Deadlines(plan.recipe.topology.round_deadline)
        self.outer_step = outer_step_of(plan.recipe)
        self.remembers = tuple(self.outer_step.remembers) if self.outer_step is not None else ()
        self.whole_manifest = whole_manifest(self.manifest, self.remembers)
        """Of a state with what is remembered of it."""
        self.last = store.load_last(self.manifest, self.remembers)
        self.ledger = self.last.ledger.copy()
        self.working = 0
        self.catching_up = False
        self.finished = False
        self.news = asyncio.Event()
        """A flag, set when something came in that the loop may wait for."""
        self.matchmaking = Matchmaking(plan, OpenedSum(store.opened_file), event, self.news.set)
        self._began: dict[int, float] = {}
        self._last_arrival = 0.0

    @property
    def start(self) -> TrainableState:
        """The state that the next round begins with."""
        return self.last.state or self.initial

    @property
    def memory(self) -> Memory:
        """What the outer step remembers before the next round."""
        return self.last.memory or first_memory(self.outer_step, self.manifest)

    @property
    def start_digest(self) -> str:
        """The digest of that state with what is remembered of it: nodes that differ in either go apart."""
        return self.last.state_digest or together(self.initial, self.memory).digest

    def begin(self, number: int, now: float) -> None:
        """Begin to train a round."""
        self.working, self.catching_up = number, False
        self._began = {number - 1: self._began.get(number - 1, now), number: now}
        self._last_arrival = now

    def seconds_into(self, number: int, now: float) -> float:
        """Seconds since this node began a round; 0 for one that it did not begin."""
        return now - self._began.get(number, now)

    def arrived(self, now: float) -> None:
        """Note an update, own or received."""
        self._last_arrival = now
        self.news.set()

    async def news_until(self, moment: float) -> None:
        """Wait until something comes in, or this moment."""
        try:
            async with asyncio.timeout_at(moment):
                await self.news.wait()
        except TimeoutError:
            pass
        self.news.clear()

    def commit(self, mean: TrainableState, contributors: Sequence[str], scale: Scale | None = None) -> None:
        """Commit the round after the last committed one, which led to this mean."""
        state, memory = mean, self.memory
        if self.outer_step is not None:
            state, memory = take_step(self.outer_step, self.start, mean, memory)
        self._put_next(state, memory, contributors, scale)

    def commit_void(self) -> None:
        """Commit a round after the last committed one that changed nothing."""
        self._put_next(self.start, self.memory, (), self.last.scale)

    def _put_next(
        self, state: TrainableState, memory: Memory, contributors: Sequence[str], scale: Scale | None
    ) -> None:
        number = self.last.round + 1
        self.deadlines.observe(self._last_arrival - self._began[number])
        void_rounds = self.last.void_rounds + (not contributors)
        self.put(Commit(number, state, memory, tuple(contributors), self.ledger.copy(), scale, void_rounds))

    def note_ledger(self) -> None:
        """Commit the account as it is now, where there is a commit to put it with."""
        if self.last.state is not None:
            self.put(replace(self.last, ledger=self.ledger.copy()))

    def put(self, commit: Commit) -> None:
        """Make a state the last committed one, on disk first."""
        self.store.write(commit)
        self.last = commit
        self.inbox.forget_through(commit.round)

    def hello(self) -> Hello:
        """This node's account of itself now."""
        now = asyncio.get_running_loop().time()
        return Hello(
            run_id=self.plan.run_id,
            sender=self.plan.name,
            version=__version__,
            recipe_digest=self.plan.recipe.engine_digest,
            manifest_digest=self.manifest.digest,
            initial_digest=self.joined.initial_digest,
            committed=self.last.round,
            contributors=list(self.last.contributors),
            state_digest=self.last.state_digest,
            working=0 if self.catching_up else self.working,
            working_seconds=self.seconds_into(self.working, now),
            round_seconds=self.deadlines.typical,
            catching_up=self.catching_up,
            finished=self.finished,
            void_rounds=self.last.void_rounds,
            train_examples=self.joined.data.train_examples,
            processes=self.joined.processes,
        )
