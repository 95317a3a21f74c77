"""The work of the stage `calm`, loaded when it is trained."""

from typing import Any

from core_training.data.examples import IGNORED, Batch
from core_training.stages.base import BatchLoss
from core_training.stages.language import labelled_logits, token_logps
from core_training.stages.sft import Sft


class CalmStage(Sft):
    """Fine-tuning on conversations, with another loss."""

    def loss(self, model: Any, batch: Batch) -> BatchLoss:
        logits, labels = labelled_logits(model, batch)
        logps = token_logps(logits, labels)
        weight = logps.detach().exp() ** self.recipe.stage_settings.gamma
        tokens = (labels != IGNORED).sum()
        return BatchLoss(-(weight * logps).sum(), tokens, tokens)
