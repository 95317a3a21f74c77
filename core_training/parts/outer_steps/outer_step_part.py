"""What can be said of an outer step without loading it."""

from __future__ import annotations

from dataclasses import dataclass

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
