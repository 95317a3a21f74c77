"""FedAdagrad (Reddi et al. 2021, algorithm 2, β₁ = 0): v⁺ = v + d², x⁺ = x + ηd/(√v⁺ + τ), where d = m − x."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from core_training.recipe.sections.aggregation import Outer
from strategies.outer_steps.outer_step import Values


class Adagrad:
    """Divides each value's change by all its changes so far; v begins with τ²."""

    def __init__(self, outer: Outer) -> None:
        assert outer.tau is not None, "it is resolved when the recipe is read"
        self._rate, self._tau = outer.rate, outer.tau
        self.remembers = {"second_moment": outer.tau**2}

    def step(self, start: Values, mean: Values, memory: Mapping[str, Values]) -> tuple[Values, Mapping[str, Values]]:
        """See `OuterStep.step`."""
        change = mean - start
        second = memory["second_moment"] + change**2
        return start + self._rate * change / (np.sqrt(second) + self._tau), {"second_moment": second}
