"""Next-token prediction: shared by pre-training and supervised fine-tuning, and the log-probabilities of the others.

The output layer runs only where a label is: masked prompt tokens pay for no logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core_training.data.examples import IGNORED, Batch
from core_training.models.base_model import BaseModel
from core_training.recipe.schema import Recipe
from core_training.stages.balance import balance_loss
from core_training.stages.base import BatchLoss, Stage, V


def labelled_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and next-token labels at the positions where any sequence of the batch has a label.

    Returns float32 logits of shape (sequences, positions, vocabulary) and labels of shape (sequences, positions).
    """
    return labelled_output(model, batch)[1:]


def labelled_output(model: nn.Module, batch: Batch, **settings: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model's whole output, asked for with further settings of its forward; logits and labels as above."""
    labels, positions = batch["labels"][:, 1:], labelled_positions(batch)
    output = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        logits_to_keep=positions,
        use_cache=False,
        **settings,
    )
    return output, at_positions(output.logits, positions).float(), labels[:, positions]


def labelled_positions(batch: Batch) -> torch.Tensor:
    """The positions, shape (positions,), before those where any sequence of the batch has a label."""
    positions = (batch["labels"][:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    if positions.numel() == 0:  # nothing to learn here: one ignored position keeps the loss a differentiable zero
        return torch.zeros(1, dtype=torch.long, device=positions.device)
    return positions


def at_positions(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What a model computed, shape (sequences, …), at these positions, to which some families do not keep."""
    return values if values.shape[1] == len(positions) else values[:, positions]


def token_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability (nats) of each label, 0 where there is none; shapes as in `labelled_logits`."""
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -nll.view(labels.shape)


def sequence_logps(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (nats) of each sequence's labelled tokens together, and their number; both (sequences,)."""
    logits, labels = labelled_logits(model, batch)
    return token_logps(logits, labels).sum(dim=1), (labels != IGNORED).sum(dim=1)


class LanguageStage(Stage[V]):
    """The mean negative log-likelihood of the labelled tokens."""

    def __init__(self, recipe: Recipe, base: BaseModel) -> None:
        super().__init__(recipe, base)
        self.adds_up = recipe.model.router_aux_loss_coef == 0  # a balance is one of the whole batch

    def weight(self, batch: Batch) -> torch.Tensor:
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        # Shapes: logits (sequences, positions, vocabulary); labels, correct (sequences, positions); exact (sequences,).
        balance = self.recipe.model.router_aux_loss_coef if model.training else 0.0
        settings = {"output_router_logits": True} if balance else {}
        output, logits, labels = labelled_output(model, batch, **settings)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        counted = labels != IGNORED
        tokens = counted.sum()
        if balance:
            total = total + balance * tokens * balance_loss(output, self.base.model.config, batch)
        if model.training:
            return BatchLoss(total, tokens, tokens)
        correct = (logits.argmax(dim=-1) == labels) & counted
        exact = (correct == counted).all(dim=1)  # greedy decoding would give this example word for word
        rows = torch.tensor(len(labels), device=labels.device)
        figures = {"token_accuracy": (correct.sum(), tokens), "exact_match": (exact.sum(), rows)}
        return BatchLoss(total, tokens, tokens, figures)
