"""What asynchronous rounds have in common: who is at work is in every commit, and asked for the same after a kill."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cache

from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from server.aggregation import Nodes, Rounds
from server.order_exchange import Awaited, OrderExchange
from server.progress import Progress
from server.run_store import RunStore
from strategies.messages import Message

StartOf = Callable[[int], TrainableState | None]
"""The state that a round began with; None where it is kept no longer."""


class AsynchronousRounds(Rounds):
    """The rounds of one run that do not wait for all; `progress` is told who is at work.

    `initial(nodes)` is the state of round 0, had of one of these sites.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        exchange: OrderExchange,
        progress: Progress,
        store: RunStore,
        initial: Callable[[Nodes], TrainableState],
    ) -> None:
        self._folder = folder
        self._recipe = recipe
        self._exchange = exchange
        self._progress = progress
        self._store = store
        self._initial = initial
        self._awaited = Awaited()
        self._is_recalled = False

    @property
    @abstractmethod
    def at_work(self) -> dict[str, int]:
        """The sites that are at work, and since which round."""
        ...

    @abstractmethod
    def _recall(self, number: int, present: Nodes, start_of: StartOf) -> None:
        """Ask those who were at work at the last commit for the same again, where that can be done."""
        ...

    def renew(self) -> None:
        """Do nothing: what a void round was of is spent, and no other's."""

    def note(self) -> None:
        """Have the next commit say who is at work."""
        self._progress.at_work = self.at_work

    def _recall_once(self, number: int, present: Nodes) -> None:
        """Take up what an earlier process left, before the first round of this one."""
        if self._is_recalled:
            return
        self._is_recalled = True
        self._recall(number, present, cache(lambda began: self._start_of(began, present)))
        if at_work := self.at_work:
            self._folder.event(events.AskedAgain(round=number, sites=at_work))

    def _start_of(self, began: int, present: Nodes) -> TrainableState | None:
        if began == 1:
            return self._initial(present)
        return self._store.read(began - 1)[1] if began - 1 in self._store.rounds() else None

    def _send_again(
        self, orders: Message | Mapping[str, Message], nodes: Nodes, began: int, start: TrainableState
    ) -> None:
        payload = start.to_bytes() if began > 1 else b""
        self._exchange.send(orders, nodes, began, self._awaited, payload=payload)
