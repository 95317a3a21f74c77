"""Reward modelling: a scalar head learns which of two answers people prefer (Bradley–Terry)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from core_training.data.examples import Batch, Example
from core_training.data.records import Record
from core_training.models.heads import end_scores, innermost, last_labelled
from core_training.parts.data_kinds.values import PreferencePair
from core_training.parts.stages.reward import REWARD
from core_training.stages.base import BatchLoss
from core_training.stages.preference import PreferenceStage


def reward_losses(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor, centering: float) -> torch.Tensor:
    """−log σ(chosen − rejected − margin) + c·(chosen + rejected)², shape (pairs,).

    Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023; centering: Eisenstein et al. 2023.
    """
    return -F.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2


class Reward(PreferenceStage):
    """Pairs may say by what margin the chosen answer is the better one; 0 where they do not."""

    def tokenise(self, record: Record, values: PreferencePair) -> Example:
        pair = super().tokenise(record, values)
        return Example(pair.sequences, {"margin": values.margin or 0.0})

    def loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        # Shapes: scores (2 · pairs,), the chosen ones first; chosen, rejected, margin, losses (pairs,).
        chosen, rejected = end_scores(model, innermost(self.base.model).get_submodule("score"), batch).chunk(2)
        losses = reward_losses(
            chosen, rejected, batch["margin"], self.recipe.settings(REWARD).center_rewards_coefficient
        )
        return self.summed(losses, (last_labelled(batch["labels"]) + 1).sum(), chosen, rejected)
