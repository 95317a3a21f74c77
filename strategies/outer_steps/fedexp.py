"""FedExP (Jhunjhunwala et al. 2023, algorithm 1): x⁺ = x + η(m − x), η = max(1, Σpᵢ‖dᵢ‖²/(2(‖m − x‖² + ε))).

Where the sites' changes dᵢ point different ways, their mean is short against them, and the step goes beyond it.
"""

from __future__ import annotations

from copy import copy
from typing import Self

from core_training.parts.outer_steps.fedexp import Extrapolation
from core_training.recipe.sections.aggregation import Outer
from strategies.outer_steps.plain import Plain


class FedExp(Plain):
    """As far as the round's norms say, times `learning_rate`."""

    def __init__(self, outer: Outer, settings: Extrapolation) -> None:
        super().__init__(outer)
        self._epsilon = settings.epsilon

    def in_round(self, of_updates: float, of_mean: float) -> Self:
        """See `ScaledStep.in_round`."""
        step = copy(self)
        step.rate = self.rate * max(1.0, of_updates / (2 * (of_mean + self._epsilon)))
        return step
