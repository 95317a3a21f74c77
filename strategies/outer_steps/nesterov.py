"""Nesterov's momentum (Sutskever et al. 2013; Douillard et al. 2023, DiLoCo): v⁺ = μv + d, x⁺ = x + η(d + μv⁺), where
d = m − x."""

from __future__ import annotations

from collections.abc import Mapping

from strategies.outer_steps.momentum import Momentum, beyond
from strategies.outer_steps.outer_step import Values


class Nesterov(Momentum):
    """As `torch.optim.SGD(lr=η, momentum=μ, nesterov=True)` with the gradient x − m."""

    def step(self, start: Values, mean: Values, memory: Mapping[str, Values]) -> tuple[Values, Mapping[str, Values]]:
        """See `OuterStep.step`."""
        change = mean - start
        velocity = self._momentum * memory["momentum"] + change
        return beyond(mean, change, self._momentum * velocity, self._rate), {"momentum": velocity}
