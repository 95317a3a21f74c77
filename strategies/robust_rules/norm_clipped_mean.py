"""The mean of changes of bounded length (Sun et al. 2019, "Can You Really Backdoor Federated Learning?"):
x⁺ = x + Σpᵢ·min(1, c/‖dᵢ‖)·dᵢ with dᵢ = wᵢ − x and Σpᵢ = 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core_training.foundation.state import Manifest, TrainableState
from core_training.parts.aggregation_rules.norm_clipped_mean import NormClippedMean
from strategies.bounds import change_norm
from strategies.robust_rules.kept_updates import KeptUpdates, stacked


class MeanOfShortened(KeptUpdates):
    """A site moves the result by no more than its share of c."""

    def __init__(self, manifest: Manifest, start: TrainableState, settings: NormClippedMean) -> None:
        super().__init__(manifest)
        self._start = start
        self._settings = settings

    def _of(self, states: Sequence[TrainableState], weights: Sequence[float]) -> TrainableState:
        norms = np.array([change_norm(state, self._start) for state in states])
        most = float(np.median(norms)) if self._settings.norm is None else self._settings.norm
        kept = np.minimum(1.0, np.divide(most, norms, out=np.ones_like(norms), where=norms > 0))
        shares = np.array(weights) / np.sum(weights) * kept
        result = np.empty(self.manifest.size, dtype=np.float32)
        for piece, values in stacked(states):
            start = self._start.buffer[piece].astype(np.float64)
            result[piece] = start + shares @ (values - start)
        return TrainableState(self.manifest, result)
