"""Supervised fine-tuning on conversations: the assistant's tokens are learnt, everything else is context."""

from __future__ import annotations

from core_training.data.examples import Example, Tokens
from core_training.data.records import Record
from core_training.foundation.errors import InputError
from core_training.parts.data_kinds.values import Conversation, Messages
from core_training.stages.chat import conversation_tokens
from core_training.stages.language import LanguageStage


class Sft(LanguageStage[Conversation]):
    """Conversations under the model's chat template."""

    def tokenise(self, record: Record, values: Conversation) -> Example:
        messages, loss_on = values.messages, self.recipe.data.loss_on
        if loss_on == "last_answer":
            messages = _last_learnt(messages)
        tokens = conversation_tokens(messages, self.base, record, values.tools)
        if loss_on == "all":
            if any(message.get("learnt") is False for message in messages):
                raise InputError(f"{record.place}: a turn is not to be learnt, and data.loss_on: all learns every turn")
            tokens = Tokens(tokens.input_ids, tokens.input_ids)
        return Example((tokens,))


def _last_learnt(messages: Messages) -> Messages:
    """The turns with the assistant's last one as the only one that is learnt, unless it is not to be."""
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    return [message if number == last else {**message, "learnt": False} for number, message in enumerate(messages)]
