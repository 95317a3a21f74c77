"""The interface of an aggregation rule: the server's arithmetic on the sites' states in one round."""

from __future__ import annotations

from typing import Protocol

from core_training.foundation.state import TrainableState


class AggregationRule(Protocol):
    """One round's aggregation, made of the run's manifest and, where the rule has settings, those."""

    def add(self, state: TrainableState, weight: float) -> None:
        """Add one update. Raises ProtocolError, changing nothing, for what must not enter the result."""
        ...

    def result(self) -> TrainableState:
        """The next state, of at least one update."""
        ...
