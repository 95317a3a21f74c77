"""A site's update after a slice of training: the trained state, written in the recipe's codec, masked or not.

Knows nothing of how the slice was trained. The same slice is written in the same bytes, whenever it is asked for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from client.secure_side import SecureSide
from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import EvalReport, TrainReport
from core_training.parts.aggregation_rules.group_gate import GROUP_GATE
from core_training.recipe.schema import Recipe
from strategies.codec_of_round import NO_VALUES, ring_codec, state_codec, vote_codec
from strategies.draws import noise_key, rounding_key
from strategies.figures import RoundFigures
from strategies.group_gate import Ballot, mask_number
from strategies.messages import MaskedUpdate, MaskedVote, TrainOrder, Update, Vote, VoteOrder
from strategies.ring import RingCodec, RingVector
from strategies.weights import weight_in_mean


@dataclass(frozen=True)
class TrainedSlice:
    """One slice: the states before and after it, the digest of the one before, and what was measured."""

    start: TrainableState
    trained: TrainableState
    report: TrainReport
    evaluation: EvalReport | None
    start_digest: str


class UpdateWriter:
    """Writes one site's updates of one run; `secure_side` masks them, where the recipe says so.

    `recipe_text` is the recipe as it came, `initial_digest` of what the run begins with, `rounding_secret` what decides
    how this site rounds, `records` the training records that it announces, `site` its name.
    """

    def __init__(
        self,
        recipe: Recipe,
        recipe_text: str,
        initial_digest: str,
        rounding_secret: str,
        secure_side: SecureSide | None,
        records: int,
        site: str,
    ) -> None:
        self._recipe = recipe
        self._site = site
        self._recipe_text = recipe_text
        self._initial_digest = initial_digest
        self._rounding_secret = rounding_secret
        self._records = records
        self.secure_side = secure_side

    def check(self, order: TrainOrder) -> None:
        """Raise ProtocolError, before a step is taken, for an order whose update would not be written.

        Under secure aggregation the order must be the recipe's: a server that had one site take other steps than all
        others could tell its update in the sum.
        """
        topology = self._recipe.topology
        in_ring = self._recipe.privacy.ring_bits is not None and topology.kind == "federated"
        if in_ring and order.ring is None:
            raise ProtocolError("the order does not say on what scale; this run's codec is a ring")
        if not in_ring and order.ring is not None:
            raise ProtocolError("the order names a scale; this run's codec is no ring")
        if self.secure_side is None:
            return
        if order.ring is None or order.ring.masking is None:
            raise ProtocolError("the order would have the update leave unmasked; this run aggregates securely")
        if order.ring.sites > (most := self.secure_side.most_sites):
            # With room for thousands a value has two bits: changes are far below a step, and a 1 in the sum is one
            # site's; and weights and figures travel two bits at a time, each pair of them a sum of its own.
            raise ProtocolError(f"the order leaves room for {order.ring.sites} sites; this site's roster has {most}")
        if order.steps != topology.local_steps or not 0 <= order.counted < (topology.rounds or 0):
            void = f", and {order.void_rounds} of those before it void" if order.void_rounds else ""
            raise ProtocolError(
                f"round {order.round} with {order.steps} steps; the recipe has {topology.rounds} rounds with "
                f"{topology.local_steps}{void}"
            )
        if order.void_rounds >= (most := self._recipe.most_void_rounds):
            raise ProtocolError(f"{order.void_rounds} void rounds; a run of {topology.rounds} rounds ends at {most}")

    def check_vote(self, order: VoteOrder) -> None:
        """Raise ProtocolError for an order to vote where nobody votes, on more states than there are groups, in the
        open where votes are masked, or with room for more sites than there are."""
        if not self._recipe.tries_groups:
            raise ProtocolError("the rule of this run asks for no vote")
        if order.candidates > (most := self._recipe.aggregation.settings(GROUP_GATE).most_groups):
            raise ProtocolError(f"{order.candidates} states to try; a round of this run has {most} groups at most")
        side = self.secure_side
        if (order.masking is None) != (side is None):
            raise ProtocolError("the order would have the vote leave in another form than the recipe says")
        if side is not None and order.sites > side.most_sites:
            raise ProtocolError(
                f"the order leaves room for {order.sites} sites; this site's roster has {side.most_sites}"
            )

    def vote(self, order: VoteOrder, ballot: Ballot) -> Vote | MaskedVote:
        """The answer to an order to vote that `check_vote` let pass."""
        run_id, number, manifest = order.run_id, order.round, order.manifest_digest
        if self.secure_side is None:
            return Vote(run_id=run_id, round=number, manifest_digest=manifest, ballot=ballot.to_integers())
        assert order.masking is not None, "the order was checked"
        codec = vote_codec(self._recipe, order.candidates, order.sites)
        # It has no values, so there is nothing that a key would round.
        vector = codec.encode(NO_VALUES, NO_VALUES, 1, ballot.to_integers(), b"")
        context = order.context(self._recipe_text, self._initial_digest)
        place = mask_number(self._recipe, number, vote=True)
        return MaskedVote(
            run_id=run_id,
            round=number,
            manifest_digest=manifest,
            statement=self.secure_side.mask(place, order.masking, context, vector),
            payload=codec.view(vector),
        )

    def write(
        self, order: TrainOrder, trained: TrainedSlice, arrived: float, resident_seconds: float
    ) -> Update | MaskedUpdate:
        """The answer to `order`, which came at `arrived` (monotonic seconds).

        The order is one that `check` let pass. Raises ProtocolError for a change that must not enter a sum.
        """
        if self.secure_side is not None:
            return self._masked(order, trained, arrived, resident_seconds, self.secure_side)
        return Update(
            run_id=order.run_id,
            round=order.round,
            manifest_digest=order.manifest_digest,
            weight=self._weight(trained),
            train=trained.report,
            evaluation=trained.evaluation,
            resident_seconds=resident_seconds,
            payload=self._payload(order, trained),
            seconds=time.monotonic() - arrived,
        )

    def _payload(self, order: TrainOrder, trained: TrainedSlice) -> bytes | memoryview:
        # A gossip node mixes what its own site has trained, so the site hands it over as it is.
        if self._recipe.topology.kind == "gossip":
            return trained.trained.to_bytes()
        if order.ring is not None:
            codec = self._codec(order, trained)
            return codec.view(self._vector(codec, order, trained))
        plain = state_codec(self._recipe, trained.start.manifest, order.round)
        return plain.write(trained.trained, trained.start, self._rounding_key(order))

    def _masked(
        self, order: TrainOrder, trained: TrainedSlice, arrived: float, resident_seconds: float, side: SecureSide
    ) -> MaskedUpdate:
        assert order.ring is not None, "the order was checked"
        assert order.ring.masking is not None, "the order was checked"
        codec = self._codec(order, trained)
        vector = self._vector(codec, order, trained)
        began = time.monotonic()
        context = order.context(trained.start_digest, self._recipe_text, self._initial_digest)
        number = mask_number(self._recipe, order.round)
        statement = side.mask(number, order.ring.masking, context, vector)
        return MaskedUpdate(
            run_id=order.run_id,
            round=order.round,
            manifest_digest=order.manifest_digest,
            statement=statement,
            resident_seconds=resident_seconds,
            training_seconds=trained.report.seconds,
            masking_seconds=time.monotonic() - began,
            payload=codec.view(vector),
            seconds=time.monotonic() - arrived,
        )

    def _codec(self, order: TrainOrder, trained: TrainedSlice) -> RingCodec:
        assert order.ring is not None, "the order was checked"
        return ring_codec(self._recipe, trained.start.manifest, order.round, order.ring.scale, order.ring.sites)

    def _vector(self, codec: RingCodec, order: TrainOrder, trained: TrainedSlice) -> RingVector:
        figures = RoundFigures.of(trained.report, trained.evaluation).to_integers()
        key = self._rounding_key(order)
        if self._recipe.privacy.hides_sites:
            key = noise_key(
                self._rounding_secret, order.run_id, order.round, trained.start_digest, trained.trained.digest
            )
        return codec.encode(trained.trained, trained.start, int(self._weight(trained)), figures, key)

    def _weight(self, trained: TrainedSlice) -> float:
        return weight_in_mean(self._recipe, trained.report, self._records, self._site)

    def _rounding_key(self, order: TrainOrder) -> bytes:
        return rounding_key(self._recipe.training.seed, self._rounding_secret, order.round)
