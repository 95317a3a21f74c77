"""What can be said of an outer step without loading it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from core_training.parts.registry import Part, S


@dataclass(frozen=True, kw_only=True)
class OuterStepPart(Part[S]):
    """The facts of an outer step; `target` is its `strategies.outer_steps.outer_step.OuterStep`.

    The keys of `aggregation.outer` that it reads, with what they are unless a recipe says otherwise; None: it does not.
    """

    learning_rate: float = 1.0
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    tau: float | None = None
    reads_norms: bool = False
    """Whether it goes by the norms of the round's updates: not where nobody sees one of them by itself."""
    correction: str | Callable[..., Any] | None = None
    """`module:name` of the `core_training.engine.correction.Correction` that is its other half at each site, or that
    itself; made of the step's section. The step is then a `strategies.outer_steps.outer_step.CountingStep`, and sites
    are told which of their rounds counted. None: sites do not know of the step."""

    def make_correction(self, outer: Any) -> Any:
        """Make a site's half, of the section `aggregation.outer`."""
        kind = self.correction
        if isinstance(kind, str):
            module, _, name = kind.partition(":")
            kind = getattr(import_module(module), name)
        assert kind is not None, "it has one"
        return kind(*(() if self.settings is None else (getattr(outer, self.name),)))
