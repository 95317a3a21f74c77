"""Full tuning: every parameter of a model's text part is trained, and travels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core_training.tuning.base import TuningMode
from core_training.tuning.text_part import freeze_other_senses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(TuningMode):
    """The mode that leaves nothing out."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(True)
        freeze_other_senses(model)
        return model
