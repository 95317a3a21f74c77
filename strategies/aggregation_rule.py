"""The interface of an aggregation rule: the server's arithmetic on the sites' states in one round."""

from __future__ import annotations

from typing import Protocol

from core_training.foundation.state import TrainableState
from strategies.outer_steps.outer_step import Memory


class AggregationRule(Protocol):
    """One round's aggregation, made of the run's manifest, the round's start where the part asks for it, and the rule's
    settings where it has any."""

    def add(self, state: TrainableState, weight: float) -> None:
        """Add one update. Raises ProtocolError, changing nothing, for what must not enter the result."""
        ...

    def result(self) -> TrainableState:
        """The next state, of at least one update; the caller may write to it. Raises ProtocolError for too few."""
        ...


class SteppedRule(Protocol):
    """A rule whose part says that it `needs_steps`."""

    def add(self, state: TrainableState, weight: float, steps: int) -> None:
        """Add one update of so many optimizer steps. Raises ProtocolError as any rule."""
        ...


class RememberingRule(AggregationRule, Protocol):
    """A rule whose part says that it `remembers`."""

    memory: Memory
    """What it remembered of the rounds before; once it has a result, of this one too."""
