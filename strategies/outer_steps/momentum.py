"""The heavy ball (Polyak 1964; Hsu et al. 2019, FedAvgM): v⁺ = μv + (m − x), x⁺ = x + ηv⁺."""

from __future__ import annotations

from collections.abc import Mapping

from core_training.recipe.sections.aggregation import Outer
from strategies.outer_steps.outer_step import Values


class Momentum:
    """As `torch.optim.SGD(lr=η, momentum=μ)` with the gradient x − m."""

    def __init__(self, outer: Outer) -> None:
        assert outer.momentum is not None, "it is resolved when the recipe is read"
        self._rate, self._momentum = outer.rate, outer.momentum
        self.remembers = {"momentum": 0.0}

    def step(self, start: Values, mean: Values, memory: Mapping[str, Values]) -> tuple[Values, Mapping[str, Values]]:
        """See `OuterStep.step`."""
        change = mean - start
        carried = self._momentum * memory["momentum"]
        return beyond(mean, change, carried, self._rate), {"momentum": carried + change}


def beyond(mean: Values, change: Values, more: Values, rate: float) -> Values:
    """x + η(m − x + `more`), counted from the mean, so that the mean comes out bit for bit where nothing is added."""
    after = mean if rate == 1 else mean + (rate - 1) * change
    return after + rate * more if more.any() else after
