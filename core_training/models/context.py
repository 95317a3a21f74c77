"""The number of tokens that a model takes in one piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


UNLIMITED = 2**31
"""More tokens than anyone has, for a model that states no limit."""


def context_length(model: PreTrainedModel) -> int:
    """The most tokens that a model was built to look at."""
    stated = getattr(model.config, "max_position_embeddings", None)
    return int(stated) if stated and stated > 0 else UNLIMITED
