"""The geometric median by the smoothed Weiszfeld algorithm (Pillutla et al. 2022, "Robust Aggregation for Federated
Learning", algorithm 2): v ← Σβᵢwᵢ/Σβᵢ with βᵢ = αᵢ/max(ν, ‖v − wᵢ‖), from the mean.

Every v is Σcᵢwᵢ with Σcᵢ = 1, and ‖v − wᵢ‖² = ΣⱼcⱼDᵢⱼ − ½ΣⱼₖcⱼcₖDⱼₖ with the squared distances D. So the states are
read twice however many iterations there are: for D, and for the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core_training.foundation.state import Manifest, TrainableState
from core_training.parts.aggregation_rules.geometric_median import GeometricMedian
from strategies.robust_rules.kept_updates import KeptUpdates, combination, squared_distances

_STILL = 1e-12
"""The change of all shares below which nothing moves."""


class SmoothedWeiszfeld(KeptUpdates):
    """Sites with less than half of the weight cannot pull the result away."""

    def __init__(self, manifest: Manifest, settings: GeometricMedian) -> None:
        super().__init__(manifest)
        self._settings = settings

    def _of(self, states: Sequence[TrainableState], weights: Sequence[float]) -> TrainableState:
        apart = squared_distances(states)
        given = np.array(weights) / np.sum(weights)
        shares = given
        for _ in range(self._settings.iterations):
            of_each = apart @ shares
            distances = np.sqrt(np.maximum(of_each - shares @ of_each / 2, 0))
            pulls = given / np.maximum(distances, self._settings.smoothing)
            before, shares = shares, pulls / pulls.sum()
            if np.abs(shares - before).sum() < _STILL:
                break
        return combination(states, shares)
