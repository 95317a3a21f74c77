"""The number of tokens that a model takes in one piece, and that are computed together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TOKENS_AT_ONCE = 512
"""What a forward keeps for its backward soon outgrows a small model, and a CPU is hardly faster with more."""

UNLIMITED = 2**31
"""More tokens than anyone has, for a model that states no limit."""


_NAMES = ("max_position_embeddings", "max_seq_len", "context_length", "max_target_positions")
"""The keys that say it: MPT's is the second, RWKV's the third, Whisper's decoder's the last."""


def context_length(model: PreTrainedModel) -> int:
    """The most tokens that a model was built to look at."""
    for config in (model.config, model.config.get_text_config()):
        for name in _NAMES:
            stated = getattr(config, name, None)
            if isinstance(stated, int) and stated > 0:
                return stated
    return UNLIMITED
