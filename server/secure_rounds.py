"""The server's side of secure aggregation in one run: masks set up ahead for many rounds, one slot spent on each.

The set-up and the slot that is being spent are on disk, so that a server which was killed asks for the very same
vectors again: a site gives no others for that round. After it, and after a round that was void, masks are set up anew,
so that a site which lost its files is not left out for long.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from core_training.foundation.durable import commit_file
from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from security.secure_aggregation.server import ServerBatch, ServerRound
from server.aggregation import Cohort, Nodes, Outcome, RoundAggregation, check_belongs
from server.agreement import Terms
from server.mask_exchange import MaskExchange
from server.progress import Progress, SiteRound
from strategies.codec_of_round import ring_codec
from strategies.figures import RoundFigures
from strategies.messages import MaskedUpdate, Message, TrainOrder
from strategies.outer_steps.outer_step import Memory

ROUNDS_AHEAD = 16
"""The rounds that masks are set up for at a time: two exchanges for all."""


class _Kept(BaseModel):
    """A batch on disk, as `ServerBatch` has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    number: int
    slots: int
    batch: dict[str, Any]


class _Spent(BaseModel):
    """The last slot that was spent, on disk: of which batch, on which round and with whom."""

    model_config = ConfigDict(extra="forbid", strict=True)

    batch: int = 0
    slot: Annotated[int, Field(ge=-1)] = -1
    round: int = 0
    participants: list[str] = []


class SecureRounds:
    """The masks of one run."""

    def __init__(self, folder: RunFolder, recipe: Recipe, exchange: MaskExchange, progress: Progress) -> None:
        self._folder = folder
        self._recipe = recipe
        self._progress = progress
        self._rounds = recipe.topology.rounds or 0
        self._exchange = exchange
        self._batch_file = folder.path / "masks.json"
        self._slot_file = folder.path / "masks-slot.json"
        self._spent = _Spent()
        self._batch: ServerBatch | None = None
        self._waits: dict[str, int] = {}
        self._due: dict[str, int] = {}
        self._renew = True
        self._recalled = False

    def cohort(self, number: int, asked: Nodes, present: Nodes) -> Cohort:
        """The sites whose masks meet in round `number`; sets masks up where there are none for it.

        The sites of an attempt at this very round that was cut short are asked again, and no others. Raises
        ProtocolError when the set-up leaves too few.
        """
        if not self._recalled and self._slot_file.exists() and self._batch_file.exists():
            self._recall()
        self._recalled = True
        sites = self._sites_of(number, asked)
        return Cohort(sites, {node: site for node, site in present.items() if site in sites})

    def _sites_of(self, number: int, present: Nodes) -> list[str]:
        batch, spent = self._batch, self._spent
        if batch is not None:
            # Masks cancel among these participants only, and a site sends no other vector for the round.
            if spent.round == number:
                return spent.participants
            # A newcomer shares no masks with the others, and would wait for the end of the batch.
            newcomers = set(present.values()) - set(batch.sites) - self._due.keys()
            due = any(self._due.get(site, number + 1) <= number for site in present.values())
            if spent.slot + 1 < batch.batch.slots and not newcomers and not due and not self._renew:
                with suppress(ProtocolError):  # too few of them are there: those who are set masks up among themselves
                    return self._together(batch, present)
        return self._together(self._set_up(number, present), present)

    def renew(self) -> None:
        """Have masks set up anew before the next round: a site may have lost what it kept of these."""
        self._renew = True

    def note(self, number: int, delivered: Collection[str], missing: Collection[str]) -> None:
        """Note the sites that sent a masked update, and those asked in vain.

        A site that lost what it kept of its masks can send none until new ones are set up. They are, for its sake, one
        round after it was missing first, then two rounds, four, and so on.
        """
        for site in delivered:
            self._waits.pop(site, None)
        # One that is due already is missing for want of new masks, maybe: that must not put them off.
        for site in set(missing) - self._due.keys():
            self._waits[site] = 2 * self._waits.get(site, 0) or 1
            self._due[site] = number + self._waits[site]

    def begin(
        self, order: TrainOrder, cohort: Cohort, terms: Terms, start: TrainableState, memory: Memory
    ) -> MaskedAggregation:
        """Spend a slot on the order's round, or go on with the one that was spent on it."""
        return MaskedAggregation(self, self._recipe, order, cohort, terms, start)

    def spend(
        self, order: TrainOrder, participants: list[str], terms: Terms, start: TrainableState, length: int
    ) -> ServerRound:
        """The protocol's side of the order's round, in which `participants` send vectors of `length`."""
        batch, spent = self._batch, self._spent
        assert batch is not None, "masks were set up"
        if spent.round != order.round:
            spent = self._spent = _Spent(
                batch=batch.batch.number, slot=spent.slot + 1, round=order.round, participants=participants
            )
            # On disk before a site is asked: a slot used for two rounds would show the difference of two updates.
            commit_file(self._slot_file, spent.model_dump_json().encode())
        context = self._exchange.context(order, start, terms)
        return ServerRound(batch, spent.slot, order.round, context, length, participants)

    def open(self, number: int, masked: ServerRound, nodes: Nodes) -> None:
        """Have the survivors of a round open its sum. Raises ProtocolError when they cannot."""
        self._exchange.open_one(masked, nodes, number)

    def _set_up(self, number: int, present: Nodes) -> ServerBatch:
        began = time.perf_counter()
        # Where each round draws its sites, the masks of one round are those of no other.
        ahead = ROUNDS_AHEAD if self._recipe.topology.sites_per_round is None else 1
        slots = max(1, min(ahead, self._rounds - self._progress.counted))
        batch = self._exchange.new_batch(slots)
        for reason in self._exchange.set_up({0: batch}, {0: list(present.values())}, present, number).values():
            raise ProtocolError(reason)
        kept = _Kept(number=batch.batch.number, slots=slots, batch=batch.record)
        commit_file(self._batch_file, kept.model_dump_json().encode())
        self._batch, self._spent, self._renew = batch, _Spent(), False
        self._due.clear()
        self.note(number, (), set(present.values()) - set(batch.sites))
        seconds = round(time.perf_counter() - began, 3)
        self._folder.event(events.MasksSetUp(round=number, rounds=slots, sites=batch.sites, seconds=seconds))
        return batch

    @staticmethod
    def _together(batch: ServerBatch, present: Nodes) -> list[str]:
        """The present sites whose masks meet. Raises ProtocolError when they are too few to open a sum."""
        together = sorted(set(present.values()) & set(batch.sites))
        batch.check_together(together)
        return together

    def _recall(self) -> None:
        """Take up the batch whose slot was being spent; without it, masks are set up anew."""
        spent = _Spent.model_validate_json(self._slot_file.read_bytes())
        kept = _Kept.model_validate_json(self._batch_file.read_bytes())
        # The server was killed between a set-up and its first slot: the noted slot is of an older batch.
        if spent.batch != kept.number:
            return
        self._batch = self._exchange.recalled_batch(kept.number, kept.slots, kept.batch)
        if self._batch is not None:
            self._spent = spent


class Masks(Protocol):
    """The masks of one cohort, as its aggregation needs them: see `SecureRounds`."""

    def spend(
        self, order: TrainOrder, participants: list[str], terms: Terms, start: TrainableState, length: int
    ) -> ServerRound: ...

    def open(self, number: int, masked: ServerRound, nodes: Nodes) -> None: ...

    def note(self, number: int, delivered: Collection[str], missing: Collection[str]) -> None: ...


class MaskedAggregation(RoundAggregation):
    """Masked updates: one by itself says nothing, and their sum opens once the survivors agree to it."""

    reply = MaskedUpdate
    repeatable = False  # the masks are spent

    def __init__(
        self,
        masks: Masks,
        recipe: Recipe,
        order: TrainOrder,
        cohort: Cohort,
        terms: Terms,
        start: TrainableState,
    ) -> None:
        super().__init__(recipe, order, cohort.asked)
        assert order.ring is not None
        self._masks = masks
        self._codec = ring_codec(recipe, terms.manifest, order.round, order.ring.scale, order.ring.sites)
        self._start = start
        self.masked = masks.spend(order, cohort.sites, terms, start, self._codec.length)
        """The protocol's side of it."""

    def orders(self) -> Mapping[str, Message]:
        ring = self._order.ring
        assert ring is not None
        return {
            site: self._order.model_copy(
                update={"ring": ring.model_copy(update={"masking": self.masked.mask_order(site)})}
            )
            for site in self.masked.participants
        }

    def take(self, site: str, update: MaskedUpdate) -> None:
        check_belongs(update, self._order)
        self.masked.add(site, update.statement, self._codec.from_bytes(update.payload))
        self.sites[site] = SiteRound(
            seconds=update.training_seconds,
            seconds_in_all=update.seconds,
            resident_seconds=update.resident_seconds,
            masking_seconds=update.masking_seconds,
        )

    def outcome(self, least: int) -> Outcome:
        self._masks.note(self._order.round, self.sites, set(self.asked.values()) - self.sites.keys())
        return super().outcome(least)

    def _outcome(self) -> Outcome:
        survivors = {node: site for node, site in self.asked.items() if site in self.sites}
        self._masks.open(self._order.round, self.masked, survivors)
        opened = self._codec.decode(self.masked.finish(), len(self.sites), self._start)
        return self._of_ring(opened, RoundFigures.from_integers(opened.figures))
