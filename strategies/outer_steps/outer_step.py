"""The interface of an outer step, and the step itself, piece by piece.

The mean of a round is a direction as well: from x, the state the round began with, to m. An outer step takes m − x for
the negative of a gradient, as an optimizer does (Reddi et al. 2021, algorithm 1). It needs no more than the mean, so it
works with every rule and under masks. Pure: knows no rounds, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from core_training.foundation.errors import DivergedError
from core_training.foundation.state import Manifest, TrainableState
from core_training.recipe.schema import Recipe
from strategies.draws import PIECE

Values: TypeAlias = npt.NDArray[np.float64]
Memory: TypeAlias = Mapping[str, TrainableState]
"""What a step remembers from one round that counted to the next, by name: each like a state. Empty at first."""


class OuterStep(Protocol):
    """Made of the section `aggregation.outer` and, where the step has settings of its own, those."""

    @property
    def remembers(self) -> Mapping[str, float]:
        """The names (as of files) of what it remembers for each value, and what that is before the first round."""
        ...

    def step(self, start: Values, mean: Values, memory: Mapping[str, Values]) -> tuple[Values, Mapping[str, Values]]:
        """The next values, and what to remember of them. Each value by itself; what is given stays as it is."""
        ...


class ScaledStep(OuterStep, Protocol):
    """A step whose part says that it `reads_norms`."""

    rate: float
    """How often it goes the way to the mean."""

    def in_round(self, of_updates: float, of_mean: float) -> Self:
        """The step of one round, by the weighted mean of its updates' squared L2 norms and the squared one of their
        mean."""
        ...


class CountingStep(OuterStep, Protocol):
    """A step whose part says that it has a `correction` at each site."""

    def of_sites(self, present: int, in_all: int) -> Self:
        """The step of one round, whose mean is of so many sites of one weight, of so many in all."""
        ...


def outer_step_of(recipe: Recipe) -> OuterStep | None:
    """The recipe's outer step; None where the next state is the mean itself."""
    outer = recipe.aggregation.outer
    step: OuterStep | None = outer.step_part.make(outer, outer) if outer.used else None
    return step


def first_memory(step: OuterStep | None, manifest: Manifest) -> Memory:
    """What a step remembers before the first round that counts; nothing where there is no step."""
    starts = step.remembers if step is not None else {}
    return {
        name: TrainableState(manifest, np.full(manifest.size, value, dtype=np.float32))
        for name, value in starts.items()
    }


def take_step(
    step: OuterStep, start: TrainableState, mean: TrainableState, memory: Memory
) -> tuple[TrainableState, Memory]:
    """The state after a round that led from `start` to `mean`, and what to remember; `start` and `memory` stay.

    Computed in float64. The next state lies where the mean did, so that no memory is taken but for what is remembered.
    Raises DivergedError for what is no number any more.
    """
    after = mean if mean.buffer.flags.writeable else TrainableState(mean.manifest, mean.buffer.copy())
    kept = {name: TrainableState(mean.manifest, np.empty_like(mean.buffer)) for name in step.remembers}
    for first in range(0, mean.manifest.size, PIECE):
        piece = slice(first, first + PIECE)
        before = {  # in the first round piece by piece too, as in `first_memory`: no second one is held beside it
            name: memory[name].buffer[piece].astype(np.float64)
            if memory
            else np.full(after.buffer[piece].size, np.float32(value), dtype=np.float64)
            for name, value in step.remembers.items()
        }
        with np.errstate(over="ignore", invalid="ignore"):
            values, remembered = step.step(
                start.buffer[piece].astype(np.float64), mean.buffer[piece].astype(np.float64), before
            )
            after.buffer[piece] = values
            for name, buffer in kept.items():
                buffer.buffer[piece] = remembered[name]
        if not all(np.isfinite(state.buffer[piece]).all() for state in (after, *kept.values())):
            raise DivergedError(
                "aggregation.outer: the state after the step is no number any more; lower its learning_rate or momentum"
            )
    return after, kept
