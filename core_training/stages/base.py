"""The interface of a stage: it makes tokens of a record and a loss of a batch, and judges held-out examples.

A stage knows nothing of optimizers, rounds or sites; its loss is a sum over units (tokens, pairs, examples), so that
batches, processes and sites add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from core_training.data.examples import Batch, Example, Row
from core_training.data.records import Record
from core_training.foundation.trainable import NOTHING_EVALUATED, EvalReport
from core_training.models.base_model import BaseModel
from core_training.models.prepared_model import PreparedModel
from core_training.recipe.schema import Recipe


@dataclass(frozen=True)
class BatchLoss:
    """A batch's loss as sums; all tensors are scalars.

    `total` (differentiable) is the sum over `weight` units; `tokens` entered it; each of `figures` is (sum, count).
    """

    total: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor
    figures: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def sums(self) -> torch.Tensor:
        """All of it as one float64 vector: total, weight, tokens, then the figures' sums and counts by name."""
        figures = [value for name in sorted(self.figures) for value in self.figures[name]]
        return torch.stack([value.double() for value in (self.total, self.weight, self.tokens, *figures)])

    def detached(self) -> BatchLoss:
        """The same without the graph, to be kept for a report."""
        figures = {name: (total.detach(), count.detach()) for name, (total, count) in self.figures.items()}
        return BatchLoss(self.total.detach(), self.weight.detach(), self.tokens.detach(), figures)

    def report(self, examples: int) -> EvalReport:
        """The report on so many held-out examples; a batch with none counts as nothing, under the same names."""
        counted = examples > 0
        return EvalReport(
            loss_sum=counted * float(self.total),
            weight=counted * int(self.weight),
            examples=examples,
            figures={name: (counted * float(total), counted * int(n)) for name, (total, n) in self.figures.items()},
        )

    def __add__(self, other: BatchLoss) -> BatchLoss:
        """The loss of both batches together."""
        figures = {
            name: (total + other.figures[name][0], count + other.figures[name][1])
            for name, (total, count) in self.figures.items()
        }
        return BatchLoss(self.total + other.total, self.weight + other.weight, self.tokens + other.tokens, figures)


def mean_figure(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A figure that is the mean of `values`."""
    return values.float().sum(), torch.tensor(values.numel(), device=values.device)


V = TypeVar("V")


class Stage(Generic[V]):
    """One training objective on one base model, whose records say a `V` (see `parts.data_kinds`)."""

    adds_up: bool = True
    """Whether a batch's loss is the sum of what its rows would have alone, so that it can be computed in parts."""
    usual_truncation: ClassVar[str] = "keep_start"
    """What becomes of an example that is longer than a row, where the recipe does not say it."""
    needs_reference: ClassVar[bool] = False
    """Whether `reference` has numbers to give before training starts."""

    def __init__(self, recipe: Recipe, base: BaseModel) -> None:
        self.recipe = recipe
        self.truncation = recipe.training.truncation or self.usual_truncation
        self.base = base

    @property
    def initial_digest(self) -> str:
        """SHA-256 (hex) over all that sites must have in common before they train together."""
        return self.base.initial_digest

    @property
    def further_columns(self) -> list[str]:
        """The columns of a record that examples carry along as they are."""
        return []

    def tokenise(self, record: Record, values: V) -> Example:
        """Turn a record's values into tokens, uncut. Raises InputError with its place."""
        raise NotImplementedError

    def cut(self, whole: Example, limit: int) -> list[Example]:
        """The example with at most `limit` tokens a sequence; none where nothing is left to learn from."""
        short = self.shortened(whole, limit)
        return [example for example in short if all(tokens.loss_tokens for tokens in example.sequences)]

    def shortened(self, whole: Example, limit: int) -> list[Example]:
        """The example with at most `limit` tokens a sequence, whatever is left; none where it is to be left out."""
        if not is_longer(whole, limit):
            return [whole]
        if self.truncation == "leave_out":
            return []
        at_end = self.truncation == "keep_end"
        parts = (t.part(max(0, len(t) - limit), len(t)) if at_end else t.part(0, limit) for t in whole.sequences)
        return [Example(tuple(parts), whole.numbers, whole.columns)]

    def is_truncated(self, whole: Example, limit: int) -> bool:
        """Whether `cut` loses tokens of an example that it keeps."""
        return self.truncation != "leave_out" and is_longer(whole, limit)

    def check(self, examples: Sequence[Example]) -> None:
        """Look at all training examples together. Raises InputError where they cannot train this stage."""

    def arrange(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows as the loss needs them, where an example needs others beside it."""
        return rows

    def weight(self, batch: Batch) -> torch.Tensor:
        """The units in a batch: what its loss is divided by."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """The loss of a batch; figures that cost something are left out while the model trains."""
        raise NotImplementedError

    def reference(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Numbers of each row, shape (rows,), by the reference policy `model`; later batches hold them by name."""
        raise NotImplementedError

    def set_mode(self, model: nn.Module) -> None:
        """Set the model to the mode in which it is trained."""
        if not model.training:  # asking its head spares a walk through all its modules in every step
            model.train()

    def updates(
        self, prepared: PreparedModel, batches: Sequence[Sequence[Batch]], memory: dict[str, float]
    ) -> Iterator[Sequence[Sequence[Batch]]]:
        """Yield the batches of each optimizer step that one step of the run is made of, one after the other.

        `batches` are the step's own, each in the parts that are computed together. After a batch is yielded it is
        trained on before the next one is asked for. `memory` is kept from step to step, and in checkpoints.
        """
        yield batches

    def evaluate(self, prepared: PreparedModel, rows: Sequence[Row]) -> EvalReport:
        """This process's share of the evaluation on rows of one example. Every process of a group must call it."""
        report = NOTHING_EVALUATED
        for mine, batch in prepared.shared_batches(rows):
            with torch.no_grad():
                loss = self.loss(prepared.model, batch)
            report += loss.report(len(mine))
        return report


def is_longer(whole: Example, limit: int) -> bool:
    """Whether a sequence of the example is longer than that."""
    return any(len(tokens) > limit for tokens in whole.sequences)


def load_stage(recipe: Recipe, base: BaseModel) -> Stage[Any]:
    """The recipe's stage, ready to tokenise and train."""
    stage: Stage[Any] = recipe.stage_part.load()(recipe, base)
    return stage
