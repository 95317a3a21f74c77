"""A node's share in a group: it brings its update as a vector of the ring, and takes the mean in the sum.

The members first tell each other what they start from and on what scale they would write: the widest one is taken.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from core_training.foundation.state import TrainableState
from p2p.messages import PeerMessage
from p2p.progress import Progress
from security.secure_aggregation.group import GroupFault, RingForm
from security.secure_aggregation.masks import RingVector
from strategies.codec_of_round import ring_codec
from strategies.draws import noise_key, rounding_key
from strategies.figures import RoundFigures
from strategies.messages import Digest, Update
from strategies.ring import Outcome, RingCodec
from strategies.ring_scale import Scale, first_scale, most_weight_cap, next_scale, widened


class Proposal(PeerMessage):
    """A member's account of itself before an attempt."""

    manifest_digest: Digest
    start_digest: Digest
    """The digest of its start state, with what an outer step remembers of it."""
    scale: Scale | None
    """The limits that it would write with; None when it knows none, as after adopting a state."""


class GroupUpdate:
    """One node's update of one round."""

    def __init__(self, progress: Progress, update: Update, trained: TrainableState, start: TrainableState) -> None:
        self._plan = progress.plan
        self._recipe = progress.plan.recipe
        self._update = update
        self._trained = trained
        self._start = start
        self._own = Proposal(
            manifest_digest=start.manifest.digest, start_digest=progress.start_digest, scale=progress.last.scale
        )
        self._use(self._own.scale or first_scale(self._recipe, start.manifest))
        bits = self._recipe.privacy.ring_bits
        assert bits is not None
        self.form = RingForm(self._codec.length, bits // 8, self._codec.to_bytes, self._codec.read_part)

    @property
    def proposal(self) -> bytes:
        """This member's proposal, as bytes."""
        return self._own.model_dump_json().encode()

    @property
    def scale(self) -> Scale:
        """The scale that its vector is written on."""
        return self._scale

    def hold(self, scale: Scale) -> None:
        """Propose this scale from now on."""
        self._own = self._own.model_copy(update={"scale": scale})

    def widen(self) -> bool:
        """Propose a wider scale from now on; False when there is none."""
        wider = widened(self._scale, self._recipe, self._start.manifest)
        self._own = self._own.model_copy(update={"scale": wider})
        return wider != self._scale

    def vector(self, proposals: Mapping[str, bytes], must_have: Scale | None = None) -> RingVector:
        """The update as these proposals ask for it, one of each member; `must_have` is the only scale that they may.

        Raises GroupFault when one is not right, and ProtocolError when their scale would cut too much of the update.
        """
        checked = {name: self._checked(name, document) for name, document in proposals.items()}
        scales = {name: proposal.scale for name, proposal in checked.items() if proposal.scale is not None}
        if must_have is not None:
            for name, scale in scales.items():
                if Scale.widest([scale, must_have]) != must_have:
                    raise GroupFault(name, "it proposes a wider scale than that of the sum which was opened")
        if scales:
            self._use(Scale.widest(scales.values()))
        key = rounding_key(self._recipe.training.seed, self._plan.rounding_secret, self._update.round)
        if self._recipe.privacy.hides_sites:
            own, run_id, number = self._plan.rounding_secret, self._plan.run_id, self._update.round
            key = noise_key(own, run_id, number, self._start.digest, self._trained.digest)
        figures = RoundFigures.of(self._update.train, self._update.evaluation).to_integers()
        return self._codec.encode(self._trained, self._start, int(self._update.weight), figures, key)

    def read(self, total: RingVector, members: int) -> tuple[Outcome, Scale]:
        """The mean in a sum, and the next round's scale. Raises ProtocolError for a sum that is not one of updates."""
        outcome = self._codec.decode(total, members, self._start)
        return outcome, next_scale(self._scale, outcome.levels, self._recipe)

    def _checked(self, member: str, document: bytes) -> Proposal:
        try:
            proposal = Proposal.model_validate_json(document)
        except ValidationError:
            raise GroupFault(member, "its proposal is garbage") from None
        if proposal.manifest_digest != self._own.manifest_digest:
            raise GroupFault(member, "its manifest is another one: other trainable tensors")
        if proposal.start_digest != self._own.start_digest:
            raise GroupFault(member, "it has trained from another state than this node")
        if proposal.scale is not None:
            if len(proposal.scale.exponents) != len(self._start.manifest.tensors):
                raise GroupFault(member, "its scale is one of another state")
            # A larger cap would round everybody's change to nothing.
            if proposal.scale.weight_cap > most_weight_cap(self._recipe):
                raise GroupFault(member, f"weight_cap {proposal.scale.weight_cap}: no site has so much in a round")
        return proposal

    def _use(self, scale: Scale) -> None:
        self._scale = scale
        # Room for all of the roster, so that a group writes as a server's sites would, whoever is missing.
        self._codec: RingCodec = ring_codec(
            self._recipe, self._start.manifest, self._update.round, scale, len(self._plan.roster)
        )
