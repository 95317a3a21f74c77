"""Federated averaging (McMahan et al. 2017): the mean of the sites' states, weighted by their loss tokens.

Updates are added as they arrive and are not kept, so memory does not grow with the number of sites. The sums are
float64: for one site the result is its state bit for bit, and the order of arrival does not show in float32.
"""

from __future__ import annotations

import numpy as np

from core_training.errors import ProtocolError
from core_training.state import Manifest, TrainableState

MAX_WEIGHT = 1e12
"""More loss tokens than any site trains on in a round: a larger weight is a mistake or an attempt to own the model."""


class FedAvg:
    """One round's aggregation. It needs sums only, so it works under secure aggregation."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._sum = np.zeros(manifest.size, dtype=np.float64)
        self._total_weight = 0.0
        self.count = 0

    def add(self, state: TrainableState, weight: float) -> None:
        """Add one update. Raises ProtocolError, changing nothing, for what must not enter a mean."""
        if state.manifest.digest != self._manifest.digest:
            raise ProtocolError("the state has another manifest than the run")
        if not 0 < weight <= MAX_WEIGHT:
            raise ProtocolError(f"weight {weight} is not between 0 and {MAX_WEIGHT:.0e}")
        if not state.is_finite():
            raise ProtocolError("the state holds NaN or infinite values")
        # Cut in pieces, so that the float64 product never doubles the memory of the sum.
        for start in range(0, self._manifest.size, 1 << 20):
            piece = slice(start, start + (1 << 20))
            self._sum[piece] += state.buffer[piece].astype(np.float64) * weight
        self._total_weight += weight
        self.count += 1

    def result(self) -> TrainableState:
        """The weighted mean of what was added (at least one update)."""
        mean = np.empty(self._manifest.size, dtype=np.float32)
        np.divide(self._sum, self._total_weight, out=mean, casting="same_kind")
        return TrainableState(self._manifest, mean)
