"""Multi-Krum (Blanchard et al. 2017): the weighted mean of the states that Krum would choose first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core_training.foundation.state import Manifest, TrainableState
from core_training.parts.aggregation_rules.multi_krum import MultiKrum
from strategies.robust_rules.kept_updates import KeptUpdates, combination
from strategies.robust_rules.krum import nearest_to_most


class MeanOfNearest(KeptUpdates):
    """Leaves out the states that lie furthest from most others."""

    def __init__(self, manifest: Manifest, settings: MultiKrum) -> None:
        super().__init__(manifest)
        self._settings = settings

    def _of(self, states: Sequence[TrainableState], weights: Sequence[float]) -> TrainableState:
        order = nearest_to_most(states, self._settings.poisoned)
        chosen = sorted(order[: self._settings.chosen or len(states) - self._settings.poisoned])
        shares = np.array([weights[place] for place in chosen])
        return combination([states[place] for place in chosen], shares / shares.sum())
