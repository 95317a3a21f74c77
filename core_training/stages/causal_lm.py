"""Next-token prediction, shared by pre-training and supervised fine-tuning.

The output layer runs only where a label is: masked prompt tokens pay for no logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from trl import SFTConfig, SFTTrainer

from core_training.base_model import BaseModel
from core_training.recipe import Recipe
from core_training.rows import Collator
from core_training.slices import SliceableTrainer
from core_training.stages.base import IGNORED
from core_training.trainable import EvalReport


def labelled_logits(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and next-token labels at the positions where any row of the batch has a label.

    Returns float32 logits of shape (rows, positions, vocabulary) and labels of shape (rows, positions).
    """
    labels = batch["labels"][:, 1:]
    positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    if positions.numel() == 0:  # nothing to learn here: one ignored position keeps the loss a differentiable zero
        positions = torch.zeros(1, dtype=torch.long, device=labels.device)
    output = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], logits_to_keep=positions, use_cache=False
    )
    return output.logits.float(), labels[:, positions]


class CausalLMTrainer(SliceableTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the loss above: the mean over the loss tokens of the whole optimizer step."""

    def __init__(self, **kwargs: Any) -> None:
        model = kwargs["model"]
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        super().__init__(**kwargs)
        # TRL patches the model's forward for its fused loss; many trainers share one model here, so undo it.
        inner.__dict__.pop("forward", None)
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        logits, labels = labelled_logits(model, inputs)
        loss_sum = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        tokens = (labels != IGNORED).sum()
        self.step_losses.append((loss_sum.detach(), tokens))
        # num_items_in_batch counts the tokens of all processes, and gradients are averaged over the processes.
        total = tokens if num_items_in_batch is None else num_items_in_batch
        return loss_sum / torch.as_tensor(total).clamp(min=1) * self.accelerator.num_processes


def build_trainer(recipe: Recipe, base: BaseModel, rows: Any, arguments: dict[str, Any]) -> CausalLMTrainer:
    config = SFTConfig(
        **arguments,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    return CausalLMTrainer(
        model=base.model,
        args=config,
        train_dataset=rows,
        data_collator=Collator(base.tokenizer.pad_token_id),
        processing_class=base.tokenizer,
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def evaluate(model: Any, batch: dict[str, torch.Tensor]) -> EvalReport:
    """Loss and hits on one unpacked batch (a row is an example)."""
    logits, labels = labelled_logits(model, batch)
    loss_sum = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    counted = labels != IGNORED
    correct = (logits.argmax(dim=-1) == labels) & counted
    return EvalReport(
        loss_sum=float(loss_sum),
        tokens=int(counted.sum()),
        correct_tokens=int(correct.sum()),
        exact_matches=int((correct == counted).all(dim=1).sum()),
        examples=len(labels),
    )
