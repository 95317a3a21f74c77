"""Asynchronous rounds: each takes the first updates that come, whatever round they began in; the others work on.

A site is asked again once it has answered and a round is over, so no site is in a round twice, and none can fill a
buffer by itself. Who is at work since which round is in every commit: a server that was killed asks them for the very
same, which those that had carried it out answer with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from server.aggregation import ClearRound, Cohort, Nodes, RoundAggregation, StateAggregation
from server.agreement import Offer, Terms
from server.asynchronous_rounds import AsynchronousRounds, StartOf
from server.order_exchange import Awaited, OrderExchange
from server.progress import Progress
from server.run_store import RunStore
from strategies.bounds import check_change
from strategies.codec_of_round import state_codec
from strategies.messages import TrainOrder, Update
from strategies.outer_steps.outer_step import Memory
from strategies.staleness import moved, share_of


@dataclass(frozen=True)
class Begun:
    """What an update was asked for with: the order, and the state that it begins from."""

    order: TrainOrder
    start: TrainableState


class BufferedRounds(AsynchronousRounds):
    """The rounds of one run, each of the first updates that come; `order_of(number)` is the order of a round."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        exchange: OrderExchange,
        progress: Progress,
        store: RunStore,
        initial: Callable[[Nodes], TrainableState],
        announced: Mapping[str, Offer],
        order_of: Callable[[int], TrainOrder],
    ) -> None:
        super().__init__(folder, recipe, exchange, progress, store, initial)
        self._announced = announced
        self._order_of = order_of
        self._begun: dict[str, Begun] = {}

    def cohort(self, number: int, asked: Nodes, present: Nodes) -> Cohort:
        """Those of the sites that are not at work."""
        self._recall_once(number, present)
        at_work = self.at_work
        idle = {node: site for node, site in asked.items() if site not in at_work}
        return Cohort(sorted(asked.values()), idle)

    def begin(
        self, order: TrainOrder, cohort: Cohort, terms: Terms, start: TrainableState, memory: Memory
    ) -> RoundAggregation:
        at_work = self.at_work
        self._begun = {site: begun for site, begun in self._begun.items() if site in at_work}
        self._begun |= {site: Begun(order, start) for site in cohort.asked.values()}
        attempt = ClearRound(self._recipe, order, cohort.asked, terms, start, memory, self._announced)
        return BufferedAggregation(attempt, self._begun, self._awaited)

    @property
    def at_work(self) -> dict[str, int]:
        """The sites that are at work, and since which round."""
        return {asked.site: asked.round for asked in self._awaited.orders.values()}

    def _recall(self, number: int, present: Nodes, start_of: StartOf) -> None:
        nodes = {site: node for node, site in present.items()}
        for site, began in sorted(self._progress.at_work.items()):
            if site not in nodes or began >= number or (start := start_of(began)) is None:
                continue
            self._begun[site] = begun = Begun(self._order_of(began), start)
            self._send_again(begun.order, {nodes[site]: site}, began, start)


class BufferedAggregation(StateAggregation):
    """One buffer. An update whose start is of an earlier round is taken for the same change from this round's."""

    def __init__(self, attempt: ClearRound, begun: Mapping[str, Begun], awaited: Awaited) -> None:
        super().__init__(attempt)
        self.awaited = awaited
        self._begun = begun

    def take(self, site: str, update: Update) -> None:
        began = self._begun[site].order.round
        stale = self._order.round - began
        share_of(self._recipe, stale)
        # The losses of another state than the round's would say nothing of it.
        super().take(site, update.model_copy(update={"evaluation": None}) if stale else update)
        self.sites[site] = replace(self.sites[site], stale=stale)

    def _asked(self, site: str) -> tuple[TrainOrder, TrainableState]:
        begun = self._begun[site]
        return begun.order, begun.start

    def _add(self, update: Update, steps: int, start: TrainableState) -> float:
        if start is self._start:
            return super()._add(update, steps, start)
        state = state_codec(self._recipe, start.manifest, update.round).read(update.payload, start)
        norm = check_change(self._recipe, steps, state, start)
        share = share_of(self._recipe, self._order.round - update.round)
        self._rule.add(moved(state, start, self._start, share), update.weight)
        return share * norm
