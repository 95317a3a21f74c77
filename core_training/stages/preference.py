"""The base of the stages on preference pairs: a prompt with a chosen and a rejected answer, weighted by pairs."""

from __future__ import annotations

import numpy as np
import torch

from core_training.data.examples import Batch, Example
from core_training.data.records import Record
from core_training.parts.data_kinds.values import PreferencePair
from core_training.stages.base import BatchLoss, Stage, mean_figure
from core_training.stages.chat import answer_tokens


class PreferenceStage(Stage[PreferencePair]):
    """A batch of n pairs holds 2n sequences: all chosen ones, then all rejected ones."""

    def tokenise(self, record: Record, values: PreferencePair) -> Example:
        answers = (values.chosen, values.rejected)
        chosen, rejected = (answer_tokens(values.prompt, answer, self.base, record, values.tools) for answer in answers)
        return Example((chosen, rejected))

    def cut(self, whole: Example, limit: int) -> list[Example]:
        """A pair whose answers no longer differ after the cut says nothing."""
        return [
            short
            for short in super().cut(whole, limit)
            if not np.array_equal(short.sequences[0].input_ids, short.sequences[1].input_ids)
        ]

    def weight(self, batch: Batch) -> torch.Tensor:
        return torch.tensor(len(batch["input_ids"]) // 2, device=batch["input_ids"].device)

    def summed(
        self, losses: torch.Tensor, tokens: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> BatchLoss:
        """The batch's loss from that of each pair, with the figures on its rewards; all of shape (pairs,)."""
        margins = (chosen - rejected).detach()
        return BatchLoss(
            total=losses.sum(),
            weight=torch.tensor(len(losses), device=losses.device),
            tokens=tokens.sum(),
            figures={"accuracy": mean_figure(margins > 0), "margin": mean_figure(margins)},
        )
