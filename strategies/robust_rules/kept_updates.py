"""What the rules share that look at each update by itself: they keep them all, and compute piece by piece.

They take the memory of one state (4 bytes a value) for each site, where the mean takes that of two for all of them.
Updates are put in an order of their own before anything is computed, so that the order of arrival never shows, not even
in rounding. All is float64 but the states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from core_training.foundation.state import Manifest, TrainableState
from strategies.draws import PIECE
from strategies.fedavg import check_update

Values = npt.NDArray[np.float64]


class KeptUpdates(ABC):
    """One round's aggregation of updates that are kept till the end."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._updates: list[tuple[TrainableState, float]] = []

    def add(self, state: TrainableState, weight: float) -> None:
        """Keep one update. Raises ProtocolError, changing nothing, for what must not enter a result."""
        check_update(state, weight, self.manifest)
        self._updates.append((state, weight))

    def result(self) -> TrainableState:
        """The next state. Raises ProtocolError for fewer updates than the rule takes."""
        ordered = sorted(self._updates, key=lambda update: (update[0].digest, update[1]))
        return self._of([state for state, _ in ordered], [weight for _, weight in ordered])

    @abstractmethod
    def _of(self, states: Sequence[TrainableState], weights: Sequence[float]) -> TrainableState: ...


class ByValue(KeptUpdates):
    """A rule for each value by itself, weights aside."""

    def _of(self, states: Sequence[TrainableState], weights: Sequence[float]) -> TrainableState:
        result = np.empty(self.manifest.size, dtype=np.float32)
        for piece, values in stacked(states):
            result[piece] = self._of_values(values)
        return TrainableState(self.manifest, result)

    @abstractmethod
    def _of_values(self, values: Values) -> Values:
        """One row of what has a row for each site."""


def stacked(states: Sequence[TrainableState]) -> Iterator[tuple[slice, Values]]:
    """The pieces of the states, and their values with a row for each state; few enough at once for a core's cache."""
    size = states[0].manifest.size
    for first in range(0, size, PIECE // 8):
        piece = slice(first, min(first + PIECE // 8, size))
        yield piece, np.stack([state.buffer[piece] for state in states]).astype(np.float64)


def combination(states: Sequence[TrainableState], shares: Values) -> TrainableState:
    """Σ shareᵢ·stateᵢ."""
    result = np.empty(states[0].manifest.size, dtype=np.float32)
    for piece, values in stacked(states):
        result[piece] = shares @ values
    return TrainableState(states[0].manifest, result)


def squared_distances(states: Sequence[TrainableState]) -> Values:
    """‖stateᵢ − stateⱼ‖² for each pair, of the differences themselves, so that near ones lose no digits."""
    count = len(states)
    distances = np.zeros((count, count))
    for _, values in stacked(states):
        for one in range(count):
            apart = values[one + 1 :] - values[one]
            distances[one, one + 1 :] += np.einsum("ij,ij->i", apart, apart)
    return distances + distances.T
