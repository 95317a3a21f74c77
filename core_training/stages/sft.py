"""Supervised fine-tuning on conversations: the assistant's tokens are learnt, everything else is context."""

from __future__ import annotations

from core_training.data.examples import Example
from core_training.data.records import Record
from core_training.parts.data_kinds.values import Conversation
from core_training.stages.chat import conversation_tokens
from core_training.stages.language import LanguageStage


class Sft(LanguageStage[Conversation]):
    """Conversations under the model's chat template."""

    def tokenise(self, record: Record, values: Conversation) -> Example:
        return Example((conversation_tokens(values.messages, self.base, record, values.tools),))
