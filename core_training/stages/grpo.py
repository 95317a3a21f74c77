"""Group-relative policy optimisation (Shao et al. 2024): the other answers to a prompt stand in for a value model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from core_training.data.examples import Batch
from core_training.models.base_model import BaseModel
from core_training.parts.stages.grpo import GRPO
from core_training.recipe.schema import Recipe
from core_training.stages.advantages import group_relative
from core_training.stages.base import BatchLoss
from core_training.stages.kl import kl_estimates
from core_training.stages.policy_gradient import Part, PolicyGradientStage, Sum, clipped_losses, masked_figure


class Grpo(PolicyGradientStage):
    """All of an answer's tokens have its advantage. The KL is in the loss, by k3, rather than in the reward."""

    kl_estimator = "k3"

    def __init__(self, recipe: Recipe, base: BaseModel) -> None:
        super().__init__(recipe, base)
        self.kl_coef = recipe.settings(GRPO).kl_coef

    def credit(self, parts: Sequence[Part], kl_coef: float, total: Sum) -> None:
        for part in parts:
            advantages = group_relative(
                part["rewards"], self.generations, scale=self.recipe.settings(GRPO).scale_rewards
            )
            part["advantages"] = advantages.unsqueeze(1)

    def policy_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """Clipped loss + kl_coef · KL, summed over tokens: each token counts alike, in short answers and long ones.

        (The paper divides by each answer's length first, which favours short good answers and long bad ones:
        Yu et al. 2025, section 3.3.)
        """
        settings = self.recipe.settings(GRPO)
        # Shapes: scores, logps, kl (answers, positions); advantages (answers, 1); total, tokens ().
        scores = self.score(model, batch)
        mask = scores.mask
        policy, clipped = clipped_losses(scores.logps, batch["logps"], batch["advantages"], settings.cliprange)
        # From the trained forward, not from the rollout's `logps`: this KL needs a gradient.
        kl = kl_estimates(scores.logps, batch["reference_logps"], self.kl_estimator)
        tokens = mask.sum()
        return BatchLoss(
            total=((policy + settings.kl_coef * kl) * mask).sum(),
            weight=tokens,
            tokens=tokens,
            figures={
                "policy_loss": masked_figure(policy, mask),
                "clip_fraction": masked_figure(clipped, mask),
                "entropy": masked_figure(scores.entropy, mask),
            },
        )
