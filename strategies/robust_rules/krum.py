"""Krum (Blanchard et al. 2017): the state with the least sum of squared distances to its n − b − 2 nearest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.parts.aggregation_rules.krum import Krum
from strategies.robust_rules.kept_updates import KeptUpdates, squared_distances


def nearest_to_most(states: Sequence[TrainableState], poisoned: int) -> list[int]:
    """The places of the states, the one with the least score first; of equal ones, the earlier first.

    Raises ProtocolError for fewer than 2b + 3 states, where b poisoned ones could pass for the others.
    """
    count = len(states)
    if count < 2 * poisoned + 3:
        raise ProtocolError(f"{count} updates came, and with {poisoned} poisoned it takes {2 * poisoned + 3}")
    # The first of each row is its own, 0.
    nearest = np.sort(squared_distances(states), axis=1)[:, 1 : count - poisoned - 1]
    return [int(place) for place in np.argsort(nearest.sum(axis=1), kind="stable")]


class NearestToMost(KeptUpdates):
    """Chooses one site's state as it is."""

    def __init__(self, manifest: Manifest, settings: Krum) -> None:
        super().__init__(manifest)
        self._poisoned = settings.poisoned

    def _of(self, states: Sequence[TrainableState], weights: Sequence[float]) -> TrainableState:
        return states[nearest_to_most(states, self._poisoned)[0]]
