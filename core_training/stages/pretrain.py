"""Pre-training (and continued pre-training) on plain text: every token is learnt."""

from __future__ import annotations

import numpy as np

from core_training.data.examples import Example, Tokens
from core_training.data.records import Record
from core_training.models.endings import opening_tokens
from core_training.parts.data_kinds.values import Text
from core_training.stages.language import LanguageStage


class Pretrain(LanguageStage[Text]):
    """Texts closed by the end-of-sequence token; long ones become several rows, so nothing is cut off."""

    usual_truncation = "split"

    def tokenise(self, record: Record, values: Text) -> Example:
        tokenizer = self.base.tokenizer
        ids = np.asarray([*opening_tokens(values.text, tokenizer), tokenizer.eos_token_id], dtype=np.int64)
        return Example((Tokens(ids, ids.copy()),))

    def cut(self, whole: Example, limit: int) -> list[Example]:
        if self.truncation != "split":
            return super().cut(whole, limit)
        (tokens,) = whole.sequences
        parts = [tokens.part(start, start + limit) for start in range(0, len(tokens), limit)]
        return [Example((part,)) for part in parts if part.loss_tokens]

    def is_truncated(self, whole: Example, limit: int) -> bool:
        return self.truncation != "split" and super().is_truncated(whole, limit)
