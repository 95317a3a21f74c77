"""Direct preference optimisation (Rafailov et al. 2023, eq. 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from core_training.data.examples import Batch
from core_training.parts.stages.dpo import DPO
from core_training.stages.base import BatchLoss
from core_training.stages.language import sequence_logps
from core_training.stages.preference import PreferenceStage


def dpo_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """−log σ(β(chosen − rejected)); both are log-ratios of policy to reference, shape (pairs,)."""
    return -F.logsigmoid(beta * (chosen - rejected))


class Dpo(PreferenceStage):
    needs_reference = True

    def loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        # Shapes: logps, tokens (2 · pairs,), the chosen ones first; chosen, rejected, losses (pairs,).
        beta = self.recipe.settings(DPO).beta
        logps, tokens = sequence_logps(model, batch)
        chosen, rejected = logps.chunk(2)
        chosen = chosen - batch["reference_chosen"]
        rejected = rejected - batch["reference_rejected"]
        return self.summed(dpo_losses(chosen, rejected, beta), tokens, beta * chosen, beta * rejected)

    def reference(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        chosen, rejected = sequence_logps(model, batch)[0].chunk(2)
        return {"reference_chosen": chosen, "reference_rejected": rejected}
