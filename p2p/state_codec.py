"""How a node's trained state is written where each neighbour gets it by itself: whole, or as a change in bfloat16.

The change is the one from the run's initial state, which all nodes hold whatever else they have missed.
"""

from __future__ import annotations

from core_training.foundation.state import Manifest, TrainableState
from p2p.plan import RunPlan
from strategies import bf16
from strategies.draws import rounding_key
from strategies.messages import Update


class StateCodec:
    """Writes and reads the states of one run; `initial` is needed for codec bf16."""

    def __init__(self, plan: RunPlan, manifest: Manifest, initial: TrainableState | None) -> None:
        self._plan = plan
        self._manifest = manifest
        self._reference = initial if plan.recipe.privacy.codec == "bf16" else None

    def write(self, update: Update, trained: TrainableState) -> tuple[bytes, TrainableState]:
        """What the neighbours get of what the site has trained, and the state that they will read in it."""
        if self._reference is None:
            return bytes(update.payload), trained
        key = rounding_key(self._plan.recipe.training.seed, self._plan.rounding_secret, update.round)
        payload = bf16.encode(trained, self._reference, key)
        return payload, self.read(payload)

    def read(self, payload: bytes) -> TrainableState:
        """The state that was meant. Raises ProtocolError."""
        if self._reference is None:
            return TrainableState.from_bytes(payload, self._manifest)
        return bf16.decode(payload, self._reference)
