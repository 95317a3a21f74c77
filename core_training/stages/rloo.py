"""REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024): an answer is one action."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from core_training.data.examples import Batch
from core_training.models.base_model import BaseModel
from core_training.parts.stages.rloo import RLOO
from core_training.recipe.schema import Recipe
from core_training.stages.advantages import leave_one_out
from core_training.stages.base import BatchLoss, mean_figure
from core_training.stages.policy_gradient import Part, PolicyGradientStage, Sum, clipped_losses, masked_figure


class Rloo(PolicyGradientStage):
    """An answer's reward is the judge's less kl_coef·KL, its baseline the mean of the other answers to the prompt."""

    def __init__(self, recipe: Recipe, base: BaseModel) -> None:
        super().__init__(recipe, base)
        self.kl_coef = recipe.settings(RLOO).kl_coef

    def credit(self, parts: Sequence[Part], kl_coef: float, total: Sum) -> None:
        for part in parts:
            rewards = part["rewards"] - kl_coef * self.kl(part).sum(dim=1)
            # The penalty comes first, so that the others' KL is in the baseline too.
            part["advantages"] = leave_one_out(rewards, self.generations)

    def weight(self, batch: Batch) -> torch.Tensor:
        """The answers in a part of a rollout."""
        return torch.tensor(len(batch["mask"]), device=batch["mask"].device)

    def policy_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """The clipped loss with the probability ratio of whole answers, summed over them."""
        # Shapes: scores, logps (answers, positions); advantages, losses, clipped (answers,); total, tokens ().
        scores = self.score(model, batch)
        losses, clipped = clipped_losses(
            # Summed before the ratio is made: an answer is one action, clipped as a whole or not at all.
            scores.logps.sum(dim=1),
            batch["logps"].sum(dim=1),
            batch["advantages"],
            self.recipe.settings(RLOO).cliprange,
        )
        return BatchLoss(
            total=losses.sum(),
            weight=self.weight(batch),
            tokens=scores.mask.sum(),
            figures={
                "clip_fraction": mean_figure(clipped),
                "entropy": masked_figure(scores.entropy, scores.mask),
            },
        )
