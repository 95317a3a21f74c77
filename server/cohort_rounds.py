"""Asynchronous rounds of which only sums are seen: several cohorts are at work, and a round is of the first one's sum.

A cohort's sites begin from one state, so that their changes add up in a ring, masked or not. Under masks each cohort
has a set-up of its own, with what every site demands of a cohort. What is in flight is on disk before a site is asked,
and each commit says which sites are at work still: a server that was killed asks the same cohorts for the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from core_training.foundation.bounded_reading import MOST_JSON_BYTES, read_bounded
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from security.secure_aggregation.server import ServerBatch, ServerRound
from server.aggregation import ClearRounds, Cohort, Nodes, Outcome, RoundAggregation
from server.agreement import Terms
from server.asynchronous_rounds import AsynchronousRounds, StartOf
from server.mask_exchange import MaskExchange
from server.order_exchange import Awaited, OrderExchange
from server.progress import Progress
from server.run_store import RunStore
from server.secure_rounds import MaskedAggregation
from strategies.cohorts import cohorts_of
from strategies.messages import Message, TrainOrder
from strategies.outer_steps.outer_step import Memory
from strategies.staleness import moved, share_of

_LONGEST_WAIT = 64
"""Rounds for which a site that fails every cohort is left out, at most."""


class _Kept(BaseModel):
    """A cohort in flight, on disk: its order, its sites and, under masks, its batch as `ServerBatch` has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    order: TrainOrder
    sites: list[str]
    batch_number: int = 0
    batch: dict[str, Any] | None = None


_KEPT = TypeAdapter(list[_Kept])


@dataclass(frozen=True, eq=False)
class _Flight:
    """A cohort at work: what it was asked for, from which state, and its sum so far."""

    order: TrainOrder
    cohort: Cohort
    start: TrainableState
    part: RoundAggregation
    batch: ServerBatch | None

    def kept(self) -> _Kept:
        if self.batch is None:
            return _Kept(order=self.order, sites=self.cohort.sites)
        number, record = self.batch.batch.number, self.batch.record
        return _Kept(order=self.order, sites=self.cohort.sites, batch_number=number, batch=record)

    def orders(self) -> Mapping[str, Message]:
        orders = self.part.orders()
        return dict.fromkeys(self.cohort.sites, orders) if isinstance(orders, Message) else orders


class CohortRounds(AsynchronousRounds):
    """The rounds of one run, each of one cohort's sum. `terms()` are what the sites agreed on.

    `masks` is None where updates travel in a ring without masks.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        exchange: OrderExchange,
        progress: Progress,
        store: RunStore,
        initial: Callable[[Nodes], TrainableState],
        clear: ClearRounds,
        masks: MaskExchange | None,
        terms: Callable[[], Terms],
    ) -> None:
        super().__init__(folder, recipe, exchange, progress, store, initial)
        self._clear = clear
        self._masks = masks
        self._terms = terms
        self._file = folder.path / "cohorts.json"
        self._flights: list[_Flight] = []
        self._batches: dict[int, ServerBatch] = {}
        self._seconds: dict[str, float] = {}
        self._waits: dict[str, int] = {}
        """Of sites that failed their last cohort: the rounds that they are left out for, twice as many each time."""
        self._due: dict[str, int] = {}

    def cohort(self, number: int, asked: Nodes, present: Nodes) -> Cohort:
        """The cohorts that begin with round `number`, of sites that are not at work.

        Raises ProtocolError when none can be set up, and none is at work.
        """
        self._recall_once(number, present)
        there = set(asked.values()) - self.at_work.keys()
        idle = sorted(site for site in there if self._due.get(site, number) <= number)
        parts = {site: summary.rounds or 0 for site, summary in self._progress.sites.items()}
        drawn = cohorts_of(self._recipe, number, idle, parts, self._seconds)
        if not drawn and not self._flights:  # too few for a whole one, and nobody else will come
            drawn = [idle if len(idle) >= self._recipe.needed_sites else sorted(there)]
        cohorts = dict(enumerate(drawn, start=1))
        if self._masks is not None and cohorts:
            cohorts = self._set_up(number, cohorts, present, self._masks)
        if not cohorts and not self._flights:
            raise ProtocolError("no cohort came together")
        return Cohort.in_groups(sorted(asked.values()), cohorts, present)

    def begin(
        self, order: TrainOrder, cohort: Cohort, terms: Terms, start: TrainableState, memory: Memory
    ) -> RoundAggregation:
        new = [self._flight(order, group, terms, start, self._batches.get(key)) for key, group in cohort.groups.items()]
        self._flights += new
        if new:  # what is over meanwhile may stay there: the commits say that it is
            # On disk before a site is asked: it masks no round twice.
            commit_file(self._file, _KEPT.dump_json([flight.kept() for flight in self._flights]))
        orders = {site: one for flight in new for site, one in flight.orders().items()}
        return CohortAggregation(self, self._folder, self._recipe, order, cohort.asked, start, orders, self._awaited)

    @property
    def at_work(self) -> dict[str, int]:
        """The sites that are at work, and since which round."""
        return {site: flight.order.round for flight in self._flights for site in flight.cohort.sites}

    def flight_of(self, site: str) -> _Flight:
        return next(flight for flight in self._flights if site in flight.cohort.sites)

    def over(self) -> list[_Flight]:
        """The cohorts of which nobody is waited for any more, the oldest first."""
        waited = {asked.site for asked in self._awaited.orders.values()}
        return [flight for flight in self._flights if waited.isdisjoint(flight.cohort.sites)]

    def end(self, flight: _Flight, number: int) -> None:
        """Note that a cohort is at work no more; its sites can be asked anew, those that failed it a while later."""
        self._flights.remove(flight)
        self._put_off(number, set(flight.cohort.sites) - flight.part.sites.keys())
        for site in flight.part.sites:
            self._waits.pop(site, None)
        self._seconds |= {site: part.seconds_in_all for site, part in flight.part.sites.items()}

    def _put_off(self, number: int, sites: Collection[str]) -> None:
        """Leave out sites that failed their cohort, so that they do not take others with them each round."""
        for site in sites:
            self._waits[site] = min(2 * self._waits.get(site, 0) or 1, _LONGEST_WAIT)
            self._due[site] = number + 1 + self._waits[site]

    def _set_up(
        self, number: int, cohorts: Mapping[int, list[str]], present: Nodes, masks: MaskExchange
    ) -> dict[int, list[str]]:
        """The cohorts whose masks meet, with those of their sites that set them up."""
        began = time.perf_counter()
        made = {key: masks.new_batch(1, place=key) for key in cohorts}
        batches = dict(made)
        for key, reason in masks.set_up(made, cohorts, present, number).items():
            del batches[key]
            said = f"its masks cannot be set up: {reason}"
            self._folder.event(events.CohortLeftOut(round=number, sites=cohorts[key], reason=said))
        self._batches = batches
        for key, asked in cohorts.items():
            self._put_off(number, set(asked) - set(made[key].sites or made[key].keys))
        sites = sorted(site for batch in batches.values() for site in batch.sites)
        seconds = round(time.perf_counter() - began, 3)
        self._folder.event(events.MasksSetUp(round=number, rounds=1, sites=sites, seconds=seconds))
        return {key: batch.sites for key, batch in batches.items()}

    def _flight(
        self, order: TrainOrder, cohort: Cohort, terms: Terms, start: TrainableState, batch: ServerBatch | None
    ) -> _Flight:
        part: RoundAggregation
        if batch is None or self._masks is None:
            part = self._clear.begin(order, cohort, terms, start, {})
        else:
            part = MaskedAggregation(_MasksOfCohort(self._masks, batch), self._recipe, order, cohort, terms, start)
        return _Flight(order, cohort, start, part, batch)

    def _recall(self, number: int, present: Nodes, start_of: StartOf) -> None:
        if not self._file.exists():
            return
        for kept in _KEPT.validate_json(read_bounded(self._file, MOST_JSON_BYTES)):
            began = kept.order.round
            # What began with the round that was not committed is in no state; of the others the commit says it.
            in_no_state = began == number or self._progress.at_work.get(kept.sites[0]) == began
            batch = None
            if self._masks is not None and kept.batch is not None:
                batch = self._masks.recalled_batch(kept.batch_number, 1, kept.batch)
            if not in_no_state or (batch is None) != (self._masks is None) or (start := start_of(began)) is None:
                continue
            flight = self._flight(kept.order, Cohort.of(kept.sites, present), self._terms(), start, batch)
            self._flights.append(flight)
            self._send_again(flight.orders(), flight.cohort.asked, began, start)


class _MasksOfCohort:
    """The masks of one cohort, as its aggregation needs them."""

    def __init__(self, exchange: MaskExchange, batch: ServerBatch) -> None:
        self._exchange = exchange
        self._batch = batch

    def spend(
        self, order: TrainOrder, participants: list[str], terms: Terms, start: TrainableState, length: int
    ) -> ServerRound:
        context = self._exchange.context(order, start, terms)
        return ServerRound(self._batch, 0, order.round, context, length, participants)

    def open(self, number: int, masked: ServerRound, nodes: Nodes) -> None:
        """Have the survivors open the sum. Raises ProtocolError when they cannot."""
        self._exchange.open_one(masked, nodes, number)

    def note(self, number: int, delivered: object, missing: object) -> None:
        """Do nothing: masks are set up for each cohort."""


class CohortAggregation(RoundAggregation):
    """One attempt at a round: it is over when a cohort is."""

    repeatable = False  # what came of a cohort is spent

    def __init__(
        self,
        rounds: CohortRounds,
        folder: RunFolder,
        recipe: Recipe,
        order: TrainOrder,
        asked: Nodes,
        start: TrainableState,
        orders: Mapping[str, Message],
        awaited: Awaited,
    ) -> None:
        super().__init__(recipe, order, asked)
        self.awaited = awaited
        self.reply = MaskedAggregation.reply if recipe.privacy.secure else RoundAggregation.reply
        self._rounds = rounds
        self._folder = folder
        self._start = start
        self._orders = orders

    def orders(self) -> Mapping[str, Message]:
        """Those of the cohorts that begin with this round."""
        return self._orders

    def take(self, site: str, update: Any) -> None:
        self._rounds.flight_of(site).part.take(site, update)

    @property
    def is_full(self) -> bool:
        return any(self._stale(flight) <= self._recipe.topology.most_stale for flight in self._rounds.over())

    def outcome(self, least: int) -> Outcome:
        """The sum of the cohort that has been over for longest. Raises ProtocolError where it cannot be had."""
        for flight in self._rounds.over():
            self._rounds.end(flight, self._order.round)
            try:
                share = share_of(self._recipe, self._stale(flight))
            except ProtocolError as error:
                sites = flight.cohort.sites
                self._folder.event(events.CohortLeftOut(round=self._order.round, sites=sites, reason=str(error)))
                continue
            return self._moved(flight, flight.part.outcome(least), share)
        raise ProtocolError("no cohort has answered in time")

    def _outcome(self) -> Outcome:
        raise NotImplementedError("its cohorts have them")

    def _stale(self, flight: _Flight) -> int:
        return self._order.round - flight.order.round

    def _moved(self, flight: _Flight, outcome: Outcome, share: float) -> Outcome:
        """What a cohort came to from where it began, as though it began with this round."""
        stale, report = self._stale(flight), outcome.report
        self.sites = {site: replace(part, stale=stale) for site, part in report.sites.items()}
        if not stale:
            return replace(outcome, report=replace(report, sites=self.sites))
        # The losses of another state than the round's would say nothing of it.
        figures = replace(report.figures, eval_loss_sum=0.0, eval_weight=0, eval_examples=0)
        sites = {site: replace(part, eval_loss=None) for site, part in self.sites.items()}
        state = moved(outcome.state, flight.start, self._start, share)
        report = replace(report, figures=figures, sites=sites)
        square = outcome.mean_square
        return replace(outcome, state=state, report=report, mean_square=None if square is None else share**2 * square)
