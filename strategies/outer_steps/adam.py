"""FedAdam (Reddi et al. 2021, algorithm 2): u⁺ = β₁u + (1 − β₁)d, v⁺ = β₂v + (1 − β₂)d², x⁺ = x + ηu⁺/(√v⁺ + τ), where
d = m − x."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from core_training.recipe.sections.aggregation import Outer
from strategies.outer_steps.outer_step import Values


class Adam:
    """Moves each value by about η a round; v begins with τ², and nothing corrects the moments' start, as published."""

    def __init__(self, outer: Outer) -> None:
        assert outer.tau is not None, "it is resolved when the recipe is read"
        assert outer.betas is not None, "so are they"
        self._rate, self._tau = outer.rate, outer.tau
        self._first_beta, self._second_beta = outer.betas
        self.remembers = {"first_moment": 0.0, "second_moment": outer.tau**2}

    def step(self, start: Values, mean: Values, memory: Mapping[str, Values]) -> tuple[Values, Mapping[str, Values]]:
        """See `OuterStep.step`."""
        change = mean - start
        first = self._first_beta * memory["first_moment"] + (1 - self._first_beta) * change
        second = self._second_moment(memory["second_moment"], change**2)
        after = start + self._rate * first / (np.sqrt(second) + self._tau)
        return after, {"first_moment": first, "second_moment": second}

    def _second_moment(self, before: Values, square: Values) -> Values:
        return self._second_beta * before + (1 - self._second_beta) * square
