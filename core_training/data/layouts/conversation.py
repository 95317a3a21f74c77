"""Conversations: lists of turns, a question with its answer, Alpaca's and ShareGPT's columns."""

from __future__ import annotations

from core_training.data.layout import Layout, Raw
from core_training.data.turns import alpaca_prompt, answer_of, conversation_of, prompt_of, with_system
from core_training.parts.data_kinds.values import Conversation


def _read_messages(raw: Raw) -> Conversation:
    return Conversation(with_system(raw, conversation_of("messages", raw["messages"])))


def _read_conversations(raw: Raw) -> Conversation:
    return Conversation(with_system(raw, conversation_of("conversations", raw["conversations"])))


def _read_prompt_completion(raw: Raw) -> Conversation:
    prompt = with_system(raw, prompt_of("prompt", raw["prompt"]))
    return Conversation([*prompt, *answer_of("completion", raw["completion"])])


def _read_alpaca(raw: Raw) -> Conversation:
    return Conversation([*alpaca_prompt(raw), *answer_of("output", raw["output"])])


LAYOUTS = (
    Layout(("messages",), _read_messages, ("system",)),
    Layout(("prompt", "completion"), _read_prompt_completion, ("system",)),
    Layout(("conversations",), _read_conversations, ("system",)),
    Layout(("instruction", "output"), _read_alpaca, ("input", "system", "history")),
)
