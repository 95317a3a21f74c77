"""FedDyn (Acar et al. 2021, "Federated Learning Based on Dynamic Regularization", algorithm 1), the server's part.

The paper has h⁺ = h − α(1/n)Σ(θᵢ − x) over the sites of the round, of n in all, and x⁺ = m − h⁺/α with their mean m.
As h/α is what counts, the sum c = −n·h/α of all sites' changes is remembered in its place: c⁺ = c + s(m − x) for a
round of s sites of one weight, and x⁺ = m + c⁺/n. So it needs no more than the mean and two numbers, and n may grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Self

from core_training.parts.outer_steps.feddyn import DynamicRegularisation
from core_training.recipe.sections.aggregation import Outer
from strategies.outer_steps.outer_step import Values


class FedDyn:
    """α is the sites' alone: it does not show in what the server does."""

    remembers: Mapping[str, float] = {"changes": 0.0}

    def __init__(self, outer: Outer, settings: DynamicRegularisation) -> None:
        self._present = self._in_all = 1

    def of_sites(self, present: int, in_all: int) -> Self:
        """See `CountingStep.of_sites`."""
        step = copy(self)
        step._present, step._in_all = present, in_all
        return step

    def step(self, start: Values, mean: Values, memory: Mapping[str, Values]) -> tuple[Values, Mapping[str, Values]]:
        """See `OuterStep.step`."""
        changes = memory["changes"] + self._present * (mean - start)
        return mean + changes / self._in_all, {"changes": changes}
