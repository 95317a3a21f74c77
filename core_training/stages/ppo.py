"""Proximal policy optimisation (Schulman et al. 2017; for language models Ziegler et al. 2019, Ouyang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from core_training.data.examples import Batch
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.parts.stages.ppo import PPO
from core_training.recipe.schema import Recipe
from core_training.stages.advantages import generalised_advantages, moments, whitened
from core_training.stages.base import BatchLoss
from core_training.stages.kl import KLController
from core_training.stages.policy_gradient import Part, PolicyGradientStage, Sum, clipped_losses, masked_figure


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> torch.Tensor:
    """½·max((V − R)², (V_clipped − R)²), where V_clipped stays within `cliprange` of the value before the update."""
    # Shapes: values, old_values, returns and losses (answers, positions).
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


class Ppo(PolicyGradientStage):
    """One answer a prompt. Each token is rewarded with −kl_coef·KL, the last one with the judge's reward besides."""

    def __init__(self, recipe: Recipe, base: BaseModel) -> None:
        super().__init__(recipe, base)
        settings = recipe.settings(PPO)
        if settings.num_mini_batches > recipe.training.per_device_train_batch_size:
            raise InputError(
                f"ppo.num_mini_batches: {settings.num_mini_batches} minibatches cannot be made of a rollout of "
                f"training.per_device_train_batch_size ({recipe.training.per_device_train_batch_size}) prompts"
            )
        self.kl_coef = settings.kl_coef
        self.kl_estimator = settings.kl_estimator

    def kl_controller(self) -> KLController:
        settings = self.recipe.settings(PPO)
        return KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)

    def credit(self, parts: Sequence[Part], kl_coef: float, total: Sum) -> None:
        """`advantages`, whitened over all rollouts of the step if the recipe says so; `returns`, to fit values to."""
        settings = self.recipe.settings(PPO)
        rewards = []
        for part in parts:
            positions = torch.arange(part["mask"].shape[1], device=part["mask"].device)
            last = (part["mask"] * positions).argmax(dim=1, keepdim=True)
            rewards.append((-kl_coef * self.kl(part)).scatter_add(1, last, part["rewards"].unsqueeze(1)))
        if settings.whiten_rewards:
            # A reward shifted at every token would pay for length, or fine it.
            rewards = _whitened(rewards, parts, total, keep_mean=True)
        advantages = [
            generalised_advantages(reward, part["values"], part["mask"], settings.gamma, settings.lam)
            for reward, part in zip(rewards, parts, strict=True)
        ]
        for part, advantage in zip(parts, advantages, strict=True):
            # Before whitening: values are fitted to returns in the rewards' own units.
            part["returns"] = advantage + part["values"]
        if settings.whiten_advantages:
            advantages = _whitened(advantages, parts, total)
        for part, advantage in zip(parts, advantages, strict=True):
            part["advantages"] = advantage

    def policy_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """Policy loss + vf_coef · value loss, summed over the answers' tokens."""
        settings = self.recipe.settings(PPO)
        # Shapes: all tensors of scores and batch that are used (answers, positions); total, tokens ().
        scores = self.score(model, batch)
        assert scores.values is not None
        mask = scores.mask
        policy, clipped = clipped_losses(scores.logps, batch["logps"], batch["advantages"], settings.cliprange)
        value = value_losses(scores.values, batch["values"], batch["returns"], settings.cliprange_value)
        tokens = mask.sum()
        return BatchLoss(
            total=((policy + settings.vf_coef * value) * mask).sum(),
            weight=tokens,
            tokens=tokens,
            figures={
                "policy_loss": masked_figure(policy, mask),
                "value_loss": masked_figure(value, mask),
                "clip_fraction": masked_figure(clipped, mask),
                "entropy": masked_figure(scores.entropy, mask),
            },
        )


def _whitened(
    values: Sequence[torch.Tensor], parts: Sequence[Part], total: Sum, *, keep_mean: bool = False
) -> list[torch.Tensor]:
    """Each part's values, brought to unit variance over all parts at all processes."""
    # Sums rather than means, as parts and processes have unequal numbers of tokens.
    own = [moments(value, part["mask"]) for value, part in zip(values, parts, strict=True)]
    over = total(torch.stack(own).sum(dim=0))
    return [whitened(value, part["mask"], over, keep_mean=keep_mean) for value, part in zip(values, parts, strict=True)]
