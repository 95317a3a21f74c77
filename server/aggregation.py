"""Takes in the updates of one attempt at a round, in whatever codec they come, and makes the next state of them.

Updates are added up as they arrive and are not kept, so memory does not grow with the number of sites. Knows no
network: how a masked sum is opened is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from security.secure_aggregation.server import ServerRound
from server.progress import RoundReport, SiteRound
from strategies import bf16
from strategies.fedavg import FedAvg, most_weight
from strategies.figures import RoundFigures
from strategies.messages import EvaluateOrder, EvaluateReply, MaskedUpdate, Message, TrainOrder, Update
from strategies.ring import Outcome as RingOutcome
from strategies.ring import RingCodec, RingSum
from strategies.ring_scale import Scale, next_scale
from strategies.selection import Selection


@dataclass(frozen=True)
class Outcome:
    """What a round came to: the next state, its figures, and the scale of the round after it (rings)."""

    state: TrainableState
    report: RoundReport
    scale: Scale | None = None


class RoundAggregation(Protocol):
    """One attempt at a round."""

    @property
    def reply(self) -> type[Update] | type[MaskedUpdate]: ...

    def orders(self) -> Message | Mapping[str, Message]:
        """What the sites are told: all the same, or each its own."""
        ...

    def take(self, site: str, update: Any) -> None:
        """Add one update. Raises ProtocolError, changing nothing, for what must not enter a mean."""
        ...

    def outcome(self) -> Outcome:
        """What came of it, when at least one update was taken in. Raises ProtocolError where a sum cannot be right."""
        ...


class _Told:
    """What sites tell in the clear: their figures, checked against what the order allows."""

    def __init__(self, recipe: Recipe, order: TrainOrder) -> None:
        self._recipe = recipe
        self._order = order
        self._figures = RoundFigures()
        self._sites: dict[str, SiteRound] = {}

    def check(self, update: Update) -> None:
        check_belongs(update, self._order)
        if update.weight != update.train.weight:
            raise ProtocolError(f"weight {update.weight} is not that of its report, {update.train.weight}")
        if update.weight > (most := most_weight(self._recipe, self._order.steps)):
            raise ProtocolError(f"weight {update.weight} is more than {self._order.steps} steps can have, {most}")

    def note(self, site: str, update: Update) -> None:
        self._figures += RoundFigures.of(update.train, update.evaluation)
        self._sites[site] = SiteRound(
            seconds=update.train.seconds,
            seconds_in_all=update.seconds,
            resident_seconds=update.resident_seconds,
            loss=update.train.loss_mean,
            eval_loss=update.evaluation.loss if update.evaluation else None,
            weight=update.weight,
        )

    def report(self) -> RoundReport:
        return RoundReport(self._figures, self._sites)


class StateAggregation:
    """Updates that are read as states, each by itself: codecs fp32 and bf16. `aggregator` is a rule for them."""

    reply: type[Update] = Update

    def __init__(
        self,
        recipe: Recipe,
        order: TrainOrder,
        aggregator: FedAvg,
        start: TrainableState | None,
        selection: Selection | None,
    ) -> None:
        """`start` is the state that the round begins with, and `selection` what travels of it; fp32 has neither."""
        self._order = order
        self._told = _Told(recipe, order)
        self._aggregator = aggregator
        self._start = start
        self._selection = selection

    def orders(self) -> Message:
        return self._order

    def take(self, site: str, update: Update) -> None:
        self._told.check(update)
        self._aggregator.add(self._read(update.payload), update.weight)
        self._told.note(site, update)

    def outcome(self) -> Outcome:
        return Outcome(self._aggregator.result(), self._told.report())

    def _read(self, payload: bytes | memoryview) -> TrainableState:
        if self._start is None:
            return TrainableState.from_bytes(payload, self._aggregator.manifest)
        return bf16.decode(payload, self._start, self._selection)


class RingAggregation:
    """Updates in a ring, not masked: their sum is that of a masked round, number by number."""

    reply: type[Update] = Update

    def __init__(self, recipe: Recipe, order: TrainOrder, codec: RingCodec, start: TrainableState) -> None:
        self._recipe = recipe
        self._order = order
        self._told = _Told(recipe, order)
        self._codec = codec
        self._sum = RingSum(codec)
        self._start = start

    def orders(self) -> Message:
        return self._order

    def take(self, site: str, update: Update) -> None:
        self._told.check(update)
        self._sum.add(self._codec.from_bytes(update.payload))
        self._told.note(site, update)

    def outcome(self) -> Outcome:
        return _ring_outcome(self._recipe, self._order, self._sum.result(self._start), self._told.report())


class MaskedAggregation:
    """Masked updates: what each site sent says nothing, and their sum opens once the survivors agree to it."""

    reply: type[MaskedUpdate] = MaskedUpdate

    def __init__(
        self, recipe: Recipe, order: TrainOrder, codec: RingCodec, start: TrainableState, masked: ServerRound
    ) -> None:
        self._recipe = recipe
        self._order = order
        self._codec = codec
        self._start = start
        self.masked = masked
        self._sites: dict[str, SiteRound] = {}

    def orders(self) -> Mapping[str, Message]:
        assert self._order.ring is not None
        return {
            site: self._order.model_copy(
                update={"ring": self._order.ring.model_copy(update={"masking": self.masked.mask_order(site)})}
            )
            for site in self.masked.participants
        }

    def take(self, site: str, update: MaskedUpdate) -> None:
        check_belongs(update, self._order)
        self.masked.add(site, update.statement, self._codec.from_bytes(update.payload))
        self._sites[site] = SiteRound(
            seconds=update.training_seconds,
            seconds_in_all=update.seconds,
            resident_seconds=update.resident_seconds,
            masking_seconds=update.masking_seconds,
        )

    def outcome(self) -> Outcome:
        opened = self._codec.decode(self.masked.finish(), len(self._sites), self._start)
        report = RoundReport(RoundFigures.from_integers(opened.figures), self._sites)
        return _ring_outcome(self._recipe, self._order, opened, report)


def check_belongs(reply: Update | MaskedUpdate | EvaluateReply, order: TrainOrder | EvaluateOrder) -> None:
    """Raises ProtocolError for the answer to another order."""
    if reply.run_id != order.run_id:
        raise ProtocolError(f"the reply belongs to run {reply.run_id}")
    if reply.round != order.round:
        raise ProtocolError(f"the reply is of round {reply.round}")
    if not isinstance(reply, EvaluateReply) and reply.manifest_digest != order.manifest_digest:
        raise ProtocolError("the update has another manifest than the run")


def _ring_outcome(recipe: Recipe, order: TrainOrder, opened: RingOutcome, report: RoundReport) -> Outcome:
    assert order.ring is not None
    report = replace(report, saturated=opened.saturated)
    return Outcome(opened.state, report, next_scale(order.ring.scale, opened.levels, recipe))
