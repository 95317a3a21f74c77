"""Takes in the updates of one attempt at a round, in whatever codec they come, and makes the next state of them.

Updates are added up as they arrive and are not kept, so memory does not grow with the number of sites. Masked ones are
in `server.secure_rounds`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.parts.tuning_modes.lora import LORA
from core_training.recipe.schema import Recipe
from server.agreement import Offer, Terms
from server.order_exchange import Awaited
from server.progress import RoundReport, SiteRound
from strategies.aggregation_rule import AggregationRule, RememberingRule, SteppedRule
from strategies.bounds import check_change, check_evaluation, check_report, most_steps
from strategies.codec_of_round import ring_codec, state_codec
from strategies.figures import RoundFigures
from strategies.messages import (
    EvaluateOrder,
    EvaluateReply,
    MaskedUpdate,
    MaskedVote,
    Message,
    TrainOrder,
    Update,
    Vote,
    VoteOrder,
)
from strategies.outer_steps.outer_step import Memory
from strategies.ring import Outcome as RingOutcome
from strategies.ring import RingSum
from strategies.ring_scale import Scale, next_scale
from strategies.weights import weight_in_mean

Nodes = Mapping[int, str]
"""Nodes' ids and their sites' names."""


@dataclass(frozen=True)
class Outcome:
    """A round's result: the next state, its figures, and the scale of the round after it (rings)."""

    state: TrainableState
    report: RoundReport
    scale: Scale | None = None
    mean_square: float | None = None
    """The weighted mean of the updates' squared norms; None where nobody sees one update by itself."""
    memory: Memory | None = None
    """What a rule remembers of the round; None where it remembers nothing."""
    weight: float = 0.0
    """The weight of its updates, all together."""


class RoundAggregation(ABC):
    """One attempt at a round, in which the sites of `asked` are sent `order`."""

    reply: type[Update] | type[MaskedUpdate] = Update
    repeatable: bool = True
    """Whether the sites can be asked again when nothing came of it."""

    def __init__(self, recipe: Recipe, order: TrainOrder, asked: Nodes) -> None:
        self.asked = asked
        self.sites: dict[str, SiteRound] = {}
        """The parts of those whose updates were taken in."""
        self.wanted: int | None = None
        """The updates after which it waits for no more; None where it takes all that come in time."""
        self.awaited = Awaited()
        """The orders that are out, those of earlier rounds among them where a round does not wait for all."""
        self._recipe = recipe
        self._order = order

    def orders(self) -> Message | Mapping[str, Message]:
        """The sites' orders: the same for all, or one for each."""
        return self._order

    @property
    def is_full(self) -> bool:
        """Whether it waits for nobody else: it has the updates that it `wanted`, where it does not want all."""
        return self.wanted is not None and len(self.sites) >= self.wanted

    @abstractmethod
    def take(self, site: str, update: Any) -> None:
        """Add one update. Raises ProtocolError, changing nothing, for what must not enter a mean."""

    def outcome(self, least: int) -> Outcome:
        """The result. Raises ProtocolError for fewer updates than `least`, and where a sum cannot be right."""
        if len(self.sites) < least:
            raise ProtocolError(f"{len(self.sites)} updates came, and it takes {least}")
        return self._outcome()

    @abstractmethod
    def _outcome(self) -> Outcome: ...

    def _of_ring(self, opened: RingOutcome, figures: RoundFigures) -> Outcome:
        assert self._order.ring is not None
        report = RoundReport(figures, self.sites, opened.saturated)
        scale = next_scale(self._order.ring.scale, opened.levels, self._recipe)
        return Outcome(opened.state, report, scale, weight=opened.weight)


@dataclass(frozen=True)
class ClearRound:
    """One attempt at a round whose updates are seen one by one, and what they are read by and held against.

    `start` is the state that the round begins with, `memory` what the rule remembered before it, `announced` what the
    sites said of themselves when they joined.
    """

    recipe: Recipe
    order: TrainOrder
    asked: Nodes
    terms: Terms
    start: TrainableState
    memory: Memory
    announced: Mapping[str, Offer]


class _ClearAggregation(RoundAggregation):
    """Updates whose figures the sites report in the clear, and which are held against what each site can have done."""

    def __init__(self, attempt: ClearRound) -> None:
        super().__init__(attempt.recipe, attempt.order, attempt.asked)
        self._figures = RoundFigures()
        self._squares = self._weights = 0.0
        self._start = attempt.start
        self._announced = attempt.announced

    def take(self, site: str, update: Update) -> None:
        order, start = self._asked(site)
        check_belongs(update, order)
        offer = self._announced[site]
        self._check_weight(site, update, offer)
        steps = most_steps(self._recipe, order.steps, offer.data, offer.processes)
        check_report(self._recipe, steps, update.train, offer.data, offer.processes)
        if update.evaluation is not None:
            if not self._recipe.topology.judges(site):
                raise ProtocolError("it sends an evaluation, and is none of topology.judged_by")
            check_evaluation(self._recipe, update.evaluation, offer.data)
        self._squares += update.weight * self._add(update, steps, start) ** 2
        self._weights += update.weight
        self._figures += RoundFigures.of(update.train, update.evaluation)
        self.sites[site] = SiteRound(
            seconds=update.train.seconds,
            seconds_in_all=update.seconds,
            resident_seconds=update.resident_seconds,
            loss=update.train.loss_mean if update.train.weight else None,
            eval_loss=update.evaluation.loss if update.evaluation else None,
            weight=update.weight,
        )

    def _asked(self, site: str) -> tuple[TrainOrder, TrainableState]:
        """What a site was asked for, and the state that it was to begin from."""
        return self._order, self._start

    @property
    def _mean_square(self) -> float:
        return self._squares / self._weights

    def _check_weight(self, site: str, update: Update, offer: Offer) -> None:
        """Raise ProtocolError for another weight than follows from the report and what the site announced."""
        records, weights = offer.data.train_examples, self._recipe.aggregation.weights
        if update.weight != (weight := weight_in_mean(self._recipe, update.train, records, site)):
            of = "" if weights == "loss_units" else f" and {records} announced records by aggregation.weights {weights}"
            raise ProtocolError(f"weight {update.weight} is not that of its report{of}, {weight:.10g}")

    @abstractmethod
    def _add(self, update: Update, steps: int, start: TrainableState) -> float:
        """Add one that is sound but for its payload; returns its norm.

        `steps` is the most that its site can take, `start` the state that it began from.
        """
        ...


class StateAggregation(_ClearAggregation):
    """Updates that are read as states, each by itself."""

    def __init__(self, attempt: ClearRound) -> None:
        super().__init__(attempt)
        manifest, wanted = attempt.terms.manifest, attempt.recipe.aggregation
        self._codec = state_codec(attempt.recipe, manifest, attempt.order.round)
        self._part = wanted.rule_part
        given = (
            manifest,
            *((attempt.recipe.tuning.settings(LORA).r,) if self._part.needs_rank else ()),
            *((attempt.start,) if self._part.needs_start else ()),
            *((attempt.memory, attempt.order.round) if self._part.remembers else ()),
        )
        self._rule: AggregationRule = self._part.make(wanted, *given)

    def _add(self, update: Update, steps: int, start: TrainableState) -> float:
        state = self._codec.read(update.payload, start)
        norm = check_change(self._recipe, steps, state, start)
        if self._part.needs_steps:
            if update.train.steps > steps:
                raise ProtocolError(f"{update.train.steps} steps are more than its round has, {steps}")
            cast("SteppedRule", self._rule).add(state, update.weight, update.train.steps)
        else:
            self._rule.add(state, update.weight)
        return norm

    def _outcome(self) -> Outcome:
        state = self._rule.result()
        memory = cast("RememberingRule", self._rule).memory if self._part.remembers else None
        report = RoundReport(self._figures, self.sites)
        weight = sum(site.weight or 0.0 for site in self.sites.values())
        return Outcome(state, report, mean_square=self._mean_square, memory=memory, weight=weight)


class RingAggregation(_ClearAggregation):
    """Updates in a ring, not masked: their sum is that of a masked round, number by number."""

    def __init__(self, attempt: ClearRound) -> None:
        super().__init__(attempt)
        ring = attempt.order.ring
        assert ring is not None
        self._cap = ring.scale.weight_cap
        self._codec = ring_codec(attempt.recipe, attempt.terms.manifest, attempt.order.round, ring.scale, ring.sites)
        self._sum = RingSum(self._codec)

    def _add(self, update: Update, steps: int, start: TrainableState) -> float:
        vector = self._codec.from_bytes(update.payload)
        # Read by itself: in the sum nobody could tell whose vector is none, or has another weight than the report.
        alone = self._codec.decode(vector, 1, start)
        if alone.weight != min(update.weight, self._cap):
            raise ProtocolError(f"the vector has weight {alone.weight}, its report {update.weight:.10g}")
        norm = check_change(self._recipe, steps, alone.state, start)
        self._sum.add(vector)
        return norm

    def _outcome(self) -> Outcome:
        return replace(self._of_ring(self._sum.result(self._start), self._figures), mean_square=self._mean_square)


@dataclass(frozen=True)
class Cohort:
    """A round's participants: all its sites, and the nodes of those that are there to be asked."""

    sites: list[str]
    asked: Nodes
    groups: Mapping[int, Cohort] = field(default_factory=dict)
    """Where sums are of groups: these, by number, and all sites are in one of them."""

    @classmethod
    def of(cls, sites: list[str], present: Nodes) -> Cohort:
        """These sites, of whom those that are present can be asked."""
        return cls(sites, {node: site for node, site in present.items() if site in sites})

    @classmethod
    def in_groups(cls, sites: list[str], groups: Mapping[int, list[str]], present: Nodes) -> Cohort:
        """These sites, of whom those that are present and in a group can be asked."""
        cohorts = {number: cls.of(members, present) for number, members in groups.items()}
        return cls(sites, {node: site for one in cohorts.values() for node, site in one.asked.items()}, cohorts)

    @property
    def room(self) -> int:
        """The most updates that are in one sum."""
        return max((len(group.sites) for group in self.groups.values()), default=len(self.sites))


class Rounds(Protocol):
    """The aggregation of all rounds of a run."""

    def cohort(self, number: int, asked: Nodes, present: Nodes) -> Cohort:
        """The participants of round `number`, of those `asked`, who are some of the `present` or all.

        Raises ProtocolError when it cannot be held.
        """
        ...

    def begin(
        self, order: TrainOrder, cohort: Cohort, terms: Terms, start: TrainableState, memory: Memory
    ) -> RoundAggregation:
        """An attempt at the order's round; `start` is the state that it begins with, `memory` what a rule remembers."""
        ...

    def renew(self) -> None:
        """Take note of a void round, not repeated."""
        ...


class ClearRounds:
    """Rounds whose updates the server sees one by one; `announced` is what the sites that joined had announced."""

    def __init__(self, recipe: Recipe, announced: Mapping[str, Offer]) -> None:
        self._recipe = recipe
        self._announced = announced

    def cohort(self, number: int, asked: Nodes, present: Nodes) -> Cohort:
        return Cohort(sorted(asked.values()), asked)

    def begin(
        self, order: TrainOrder, cohort: Cohort, terms: Terms, start: TrainableState, memory: Memory
    ) -> RoundAggregation:
        kind = StateAggregation if order.ring is None else RingAggregation
        return kind(ClearRound(self._recipe, order, cohort.asked, terms, start, memory, self._announced))

    def renew(self) -> None:
        """Do nothing: no round keeps anything."""


def check_belongs(
    reply: Update | MaskedUpdate | Vote | MaskedVote | EvaluateReply, order: TrainOrder | VoteOrder | EvaluateOrder
) -> None:
    """Raise ProtocolError for the answer to another order."""
    if reply.run_id != order.run_id:
        raise ProtocolError(f"the reply belongs to run {reply.run_id}")
    if reply.round != order.round:
        raise ProtocolError(f"the reply is of round {reply.round}")
    if not isinstance(reply, EvaluateReply) and reply.manifest_digest != order.manifest_digest:
        raise ProtocolError("the update has another manifest than the run")
