"""What a stage is: the columns it reads, how a record becomes tokens, how a batch becomes a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core_training.base_model import BaseModel
from core_training.recipe import Recipe
from core_training.records import Record
from core_training.trainable import EvalReport

IGNORED = -100
"""Label of a token that does not enter the loss, as in PyTorch's cross-entropy."""


@dataclass(frozen=True)
class Example:
    """One tokenised record. `labels[i]` is `input_ids[i]` where that token is to be learnt, else IGNORED."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    @property
    def loss_tokens(self) -> int:
        return int((self.labels[1:] != IGNORED).sum())


class Stage(Protocol):
    """One training objective."""

    columns: Sequence[Sequence[str]]
    """The sets of columns it can read, best first."""
    packs_by_default: bool
    splits_long_texts: bool
    """Whether a text over `max_length` becomes several rows; otherwise it is cut, and the cut is counted."""

    def tokenise(self, record: Record, columns: dict[str, Any], base: BaseModel) -> Example:
        """Turn the stage's columns of one record into tokens, uncut. Raises InputError with the record's place."""
        ...

    def build_trainer(self, recipe: Recipe, base: BaseModel, rows: Any, arguments: dict[str, Any]) -> Any:
        """A Hugging Face trainer on `rows`, whose `step_losses` collects (loss sum, loss tokens) of every batch."""
        ...

    def evaluate(self, model: Any, batch: dict[str, Any]) -> EvalReport: ...
