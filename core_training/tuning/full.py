"""Full tuning: every parameter is trained, and every parameter travels."""

from __future__ import annotations

from typing import Any

from core_training.tuning.base import TuningMode


class Full(TuningMode):
    """The mode that leaves nothing out."""

    def apply(self, model: Any) -> Any:
        model.requires_grad_(True)
        return model
