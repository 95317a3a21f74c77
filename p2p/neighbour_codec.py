"""The codec of a node's trained state where each neighbour gets it by itself.

A change is the one from the run's initial state, which all nodes hold whatever else they have missed.
"""

from __future__ import annotations

from functools import cached_property

from core_training.foundation.state import Manifest, TrainableState
from p2p.plan import RunPlan
from strategies.codec import Fp32, StateCodec
from strategies.codec_of_round import state_codec
from strategies.draws import rounding_key
from strategies.messages import Update


class NeighbourCodec:
    """The codec of one run's states; `initial` is what changes are from, where it sends changes."""

    def __init__(self, plan: RunPlan, manifest: Manifest, initial: TrainableState) -> None:
        self._plan = plan
        self._manifest = manifest
        self._initial = initial

    @cached_property
    def _codec(self) -> StateCodec:
        return state_codec(self._plan.recipe, self._manifest, 0)

    def write(self, update: Update, trained: TrainableState) -> tuple[bytes, TrainableState]:
        """The neighbours' payload of what the site trained, and the state that they will read in it."""
        if isinstance(self._codec, Fp32) and self._codec.selection is None:  # the site handed it over just so
            return bytes(update.payload), trained
        key = rounding_key(self._plan.recipe.training.seed, self._plan.rounding_secret, update.round)
        payload = self._codec.write(trained, self._initial, key)
        return payload, self.read(payload)

    def read(self, payload: bytes) -> TrainableState:
        """The state that was meant. Raises ProtocolError."""
        return self._codec.read(payload, self._initial)
