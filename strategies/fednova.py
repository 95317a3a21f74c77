"""FedNova (Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization"),
for plain SGD: x⁺ = x + τ·Σpᵢdᵢ/τᵢ with the steps τᵢ that a site took, τ = Σpᵢτᵢ and Σpᵢ = 1.

A site that takes more steps goes further, and a mean of the changes would be drawn to its optimum for that alone.
Changes are added as they arrive and are not kept. Pure.
"""

from __future__ import annotations

import numpy as np

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from strategies.draws import PIECE
from strategies.fedavg import check_update


class FedNova:
    """One round's aggregation; sums are float64."""

    def __init__(self, manifest: Manifest, start: TrainableState) -> None:
        self.manifest = manifest
        self._start = start
        self._sum = np.zeros(manifest.size, dtype=np.float64)
        self._weights = self._steps = 0.0

    def add(self, state: TrainableState, weight: float, steps: int) -> None:
        """Add one update of so many steps. Raises ProtocolError, changing nothing, for what must not enter a mean."""
        check_update(state, weight, self.manifest)
        if steps < 1:
            raise ProtocolError(f"a change of {steps} steps is none")
        for piece in (slice(first, first + PIECE) for first in range(0, self.manifest.size, PIECE)):
            self._sum[piece] += (state.buffer[piece].astype(np.float64) - self._start.buffer[piece]) * (weight / steps)
        self._weights += weight
        self._steps += weight * steps

    def result(self) -> TrainableState:
        """The next state, of at least one update."""
        of_all = self._steps / self._weights / self._weights
        after = np.empty(self.manifest.size, dtype=np.float32)
        for piece in (slice(first, first + PIECE) for first in range(0, self.manifest.size, PIECE)):
            after[piece] = self._start.buffer[piece] + self._sum[piece] * of_all
        return TrainableState(self.manifest, after)
