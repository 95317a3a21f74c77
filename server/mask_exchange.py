"""Secure aggregation's documents on their way to the sites and back: masks are set up, and sums opened.

What is in the documents is `security.secure_aggregation`'s affair. What is wrong with one site's answer is an event, as
everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from security.secure_aggregation.server import ServerBatch, ServerRound
from security.secure_aggregation.terms import terms_of
from server.aggregation import Nodes
from server.agreement import Terms
from server.order_exchange import OrderExchange
from server.progress import Progress
from strategies.messages import SecureOrder, SecureReply, SumsOrder, TrainOrder, VoteOrder, masks_of_evaluation
from strategies.ring_scale import largest_change

_ANSWERED_WITHIN = 120.0
"""Seconds for a step in which nothing is trained: whoever hangs in it must not hold up the others for a round."""


class MaskExchange:
    """The exchange in one run, whose seconds `progress` counts.

    `roster()` maps the sites to their public identities, as all sites of the run pinned it: known once some joined.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        exchange: OrderExchange,
        progress: Progress,
        roster: Callable[[], Mapping[str, str]],
        evaluation: str | None = None,
    ) -> None:
        """`evaluation` is the key of the one whose sums are masked; None: the run's own rounds."""
        self._run_id = folder.run_id
        self._evaluation = evaluation
        self._masks_of = folder.run_id if evaluation is None else masks_of_evaluation(folder.run_id, evaluation)
        self._recipe_text = recipe.to_yaml()
        self._terms = terms_of(recipe, largest_change(recipe))
        self._exchange = exchange
        self._progress = progress
        self._roster = roster

    def new_batch(self, slots: int, place: int = 0) -> ServerBatch:
        """A batch that is not set up yet; of several that are made in one moment each has another `place`."""
        # The number must never come again in this run, also when the server is killed before anything is on disk.
        return ServerBatch(self._masks_of, time.time_ns() // 1000 + place, slots, self._roster(), self._terms)

    def recalled_batch(self, number: int, slots: int, record: dict[str, Any]) -> ServerBatch | None:
        """The batch that an earlier process set up; None where the sites have another roster by now."""
        with suppress(ProtocolError):
            return ServerBatch(self._masks_of, number, slots, self._roster(), self._terms, record)
        return None

    def context(self, order: TrainOrder, start: TrainableState, terms: Terms) -> bytes:
        """What the parties of a round must see alike."""
        return order.context(start.digest, self._recipe_text, terms.initial_digest)

    def context_of_vote(self, order: VoteOrder, terms: Terms) -> bytes:
        return order.context(self._recipe_text, terms.initial_digest)

    def context_of_sums(self, order: SumsOrder) -> bytes:
        return order.context(self._recipe_text)

    def set_up(
        self, batches: Mapping[int, ServerBatch], sites: Mapping[int, Collection[str]], present: Nodes, number: int
    ) -> dict[int, str]:
        """Have the sites of each batch set their masks up, all batches' at once.

        Returns why some cannot be used, by number.
        """
        failed: dict[int, str] = {}
        of_site = {site: batches[key] for key, members in sites.items() for site in members}
        with self._counted():
            orders = {site: self._order("keys", batch.keys_order()) for site, batch in of_site.items()}
            for site, reply in self._ask(orders, present, number):
                with self._exchange.quarantine(site, number):
                    of_site[site].add_keys(site, bytes(reply.payload))
            orders = {}
            for key, batch in batches.items():
                with _noting(failed, key):
                    orders |= self._orders("shares", batch.shares_orders())
            for site, reply in self._ask(orders, present, number):
                with self._exchange.quarantine(site, number):
                    of_site[site].add_shares(site, bytes(reply.payload))
            for key, batch in batches.items():
                if key not in failed:
                    with _noting(failed, key):
                        batch.check_together(batch.sites)
        return failed

    def open(self, sums: Mapping[int, ServerRound], nodes: Nodes, number: int) -> dict[int, str]:
        """Have the survivors of some sums open them, in one exchange; `finish` then gives each, or says what it lacks.

        Returns why some are not tried, by number: too few survived.
        """
        failed: dict[int, str] = {}
        of_site = {site: one for one in sums.values() for site in one.survivors}
        orders: dict[str, SecureOrder] = {}
        for key, one in sums.items():
            with _noting(failed, key):
                orders |= self._orders("unmask", one.unmask_orders())
        with self._counted():
            for site, reply in self._ask(orders, nodes, number):
                with self._exchange.quarantine(site, number):
                    of_site[site].add_unmasked(site, bytes(reply.payload))
        return failed

    def open_one(self, masked: ServerRound, nodes: Nodes, number: int) -> None:
        """Have the survivors of a sum open it. Raises ProtocolError where too few survived."""
        for reason in self.open({0: masked}, nodes, number).values():
            raise ProtocolError(reason)

    def _ask(self, orders: Mapping[str, SecureOrder], nodes: Nodes, number: int) -> Iterator[tuple[str, SecureReply]]:
        asked = {node: site for node, site in nodes.items() if site in orders}
        yield from self._exchange.ask(orders, asked, SecureReply, number, _ANSWERED_WITHIN)

    def _orders(self, step: Literal["shares", "unmask"], payloads: Mapping[str, bytes]) -> dict[str, SecureOrder]:
        return {site: self._order(step, payload) for site, payload in payloads.items()}

    def _order(self, step: Literal["keys", "shares", "unmask"], payload: bytes) -> SecureOrder:
        return SecureOrder(run_id=self._run_id, step=step, evaluation=self._evaluation, payload=payload)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._progress.seconds_protection += time.perf_counter() - began


@contextmanager
def _noting(failed: dict[int, str], key: int) -> Iterator[None]:
    try:
        yield
    except ProtocolError as error:
        failed[key] = str(error)
