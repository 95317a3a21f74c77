"""Pre-training (and continued pre-training) on plain text: every token is learnt."""

from __future__ import annotations

from typing import Any

import numpy as np

from core_training.base_model import BaseModel
from core_training.errors import InputError
from core_training.records import Record
from core_training.stages.base import Example
from core_training.stages.causal_lm import build_trainer, evaluate

__all__ = ["build_trainer", "columns", "evaluate", "packs_by_default", "splits_long_texts", "tokenise"]

columns = (("text",),)
packs_by_default = True
splits_long_texts = True


def tokenise(record: Record, values: dict[str, Any], base: BaseModel) -> Example:
    """The text, closed by the end-of-sequence token."""
    text = values["text"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{record.place}: the text is empty or not a string")
    tokenizer = base.tokenizer
    ids = np.asarray([*tokenizer(text)["input_ids"], tokenizer.eos_token_id], dtype=np.int64)
    return Example(ids, ids.copy())
