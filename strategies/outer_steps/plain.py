"""No memory: x⁺ = x + η(m − x), the mean itself for η = 1."""

from __future__ import annotations

from collections.abc import Mapping

from core_training.recipe.sections.aggregation import Outer
from strategies.outer_steps.outer_step import Values


class Plain:
    """Goes the way to the mean η times: beyond it for η above 1."""

    def __init__(self, outer: Outer) -> None:
        self.rate = outer.rate
        self.remembers: dict[str, float] = {}

    def step(self, start: Values, mean: Values, memory: Mapping[str, Values]) -> tuple[Values, Mapping[str, Values]]:
        """See `OuterStep.step`."""
        return (mean if self.rate == 1 else mean + (self.rate - 1) * (mean - start)), {}
