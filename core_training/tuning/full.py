"""Full tuning: every parameter is trained, and every parameter travels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core_training.tuning.base import TuningMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(TuningMode):
    """The mode that leaves nothing out."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(True)
        return model
