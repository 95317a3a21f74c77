"""Simple preference optimisation (Meng et al. 2024, eq. 6): the reward is a token's mean log-probability."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from core_training.data.examples import Batch
from core_training.parts.stages.simpo import SIMPO
from core_training.stages.base import BatchLoss
from core_training.stages.language import sequence_logps
from core_training.stages.preference import PreferenceStage


def simpo_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """−log σ(β(chosen − rejected) − γ), from mean log-probabilities of a token, shape (pairs,)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


class Simpo(PreferenceStage):
    def loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        # Shapes: logps, tokens (2 · pairs,), the chosen ones first; chosen, rejected, losses (pairs,).
        settings = self.recipe.settings(SIMPO)
        logps, tokens = sequence_logps(model, batch)
        chosen, rejected = (logps / tokens).chunk(2)
        losses = simpo_losses(chosen, rejected, settings.beta, settings.gamma)
        return self.summed(losses, tokens, settings.beta * chosen, settings.beta * rejected)
