"""Odds-ratio preference optimisation (Hong et al. 2024, eq. 6 and 7): it needs no reference policy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from core_training.data.examples import Batch
from core_training.parts.stages.orpo import ORPO
from core_training.stages.base import BatchLoss
from core_training.stages.language import sequence_logps
from core_training.stages.preference import PreferenceStage


def orpo_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """NLL(chosen) − β·log σ(log-odds ratio), from mean log-probabilities of a token, shape (pairs,)."""
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − e^x) for x < 0, without cancellation at either end."""
    x = x.clamp(max=-1e-7)  # a token that is certain has infinite odds
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


class Orpo(PreferenceStage):
    def loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        # Shapes: logps, tokens (2 · pairs,), the chosen ones first; chosen, rejected, losses (pairs,).
        beta = self.recipe.settings(ORPO).beta
        logps, tokens = sequence_logps(model, batch)
        chosen, rejected = (logps / tokens).chunk(2)
        return self.summed(orpo_losses(chosen, rejected, beta), tokens, beta * chosen, beta * rejected)
