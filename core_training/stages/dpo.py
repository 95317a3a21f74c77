"""Direct preference optimisation (Rafailov et al. 2023), by any of the losses in `dpo_losses`."""

from __future__ import annotations

import torch
from torch import nn

from core_training.data.examples import Batch
from core_training.parts.stages.dpo import DPO
from core_training.stages.base import BatchLoss
from core_training.stages.dpo_losses import DPO_LOSSES, LogRatios
from core_training.stages.language import sequence_logps
from core_training.stages.preference import PreferenceStage


class Dpo(PreferenceStage):
    needs_reference = True

    def loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        # Shapes: logps, tokens (2 · pairs,), the chosen ones first; all others (pairs,).
        settings = self.recipe.settings(DPO)
        logps, tokens = sequence_logps(model, batch)
        chosen, rejected = logps.chunk(2)
        pairs = LogRatios(chosen - batch["reference_chosen"], rejected - batch["reference_rejected"], *tokens.chunk(2))
        losses = DPO_LOSSES[settings.loss_type](pairs, settings)
        if settings.sft_weight > 0:
            losses = losses - settings.sft_weight * chosen / pairs.chosen_tokens
        return self.summed(losses, tokens, settings.beta * pairs.chosen, settings.beta * pairs.rejected)

    def reference(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        chosen, rejected = sequence_logps(model, batch)[0].chunk(2)
        return {"reference_chosen": chosen, "reference_rejected": rejected}
