"""How many tokens a model takes in one piece."""

from __future__ import annotations

from typing import Any

UNLIMITED = 2**31
"""More than anyone has, for what does not say."""


def context_length(model: Any) -> int:
    """The most tokens that a model was built to look at."""
    return int(getattr(model.config, "max_position_embeddings", None) or UNLIMITED)
