"""The facts of a stage, known without loading it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from core_training.parts.data_kinds import DataKind
from core_training.parts.registry import Part, S


def _one(settings: Any) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class StagePart(Part[S]):
    """The facts of a stage; `target` is its `core_training.stages.base.Stage`. Functions among them take settings."""

    reads: DataKind[Any]
    """The kind of data: what a record says, in whatever layout."""
    unit: Literal["tokens", "pairs", "examples", "answers"]
    """The unit that the loss is a mean over, and so the weight of an update."""
    negative: bool = True
    """Whether its loss on held-out records can be below zero; a site that reports such a one otherwise is refused."""
    learning_rate: float
    """Usual peak learning rate where whole weights are trained; see docs/stages.md for the sources."""
    adapter_learning_rate: float
    """The same for LoRA and QLoRA."""
    head: Literal["score", "value_head"] | None = None
    """The output layer that the stage adds to the model, trained in every mode."""
    packs: bool = False
    """Whether several examples can share a row."""
    samples: bool = False
    """Whether it trains on answers that the model itself gives, under the section `rollout`."""
    refers: bool = False
    """Whether its loss looks at the reference policy, the model that the run starts from."""
    rows_compared: str | None = None
    """The work that it does on a batch's rows together, if any: then a batch needs two or more."""
    answers: Callable[[S], int] = _one
    """Rows that a row of a batch becomes: the answers to a prompt."""
    passes: Callable[[S], int] = _one
    """The times that a row enters the loss in one step of the run."""
    mini_batches: Callable[[S], int] = _one
    """Optimizer steps in each of these passes."""

    def __post_init__(self) -> None:
        if not isinstance(self.reads, DataKind):
            raise TypeError(f"reads: {self.reads!r} is no DataKind")

    def optimizer_steps(self, settings: S) -> int:
        """Optimizer steps in one step of the run."""
        return self.passes(settings) * self.mini_batches(settings)
