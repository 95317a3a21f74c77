"""Prompts: what stands before an answer; an answer that stands there is left out."""

from __future__ import annotations

from core_training.data.layout import Layout, Raw
from core_training.data.turns import (
    alpaca_prompt,
    checked_prompt,
    messages_of,
    prompt_of,
    with_system,
    without_last_answer,
)
from core_training.parts.data_kinds.values import Prompt


def _read_prompt(raw: Raw) -> Prompt:
    value = raw["prompt"]
    messages = (
        without_last_answer(messages_of("prompt", value)) if isinstance(value, list) else prompt_of("prompt", value)
    )
    return Prompt(with_system(raw, checked_prompt("prompt", messages)))


def _read_prompt_of_messages(raw: Raw) -> Prompt:
    messages = without_last_answer(messages_of("messages", raw["messages"]))
    return Prompt(with_system(raw, checked_prompt("prompt", messages)))


def _read_prompt_of_conversations(raw: Raw) -> Prompt:
    messages = without_last_answer(messages_of("conversations", raw["conversations"]))
    return Prompt(checked_prompt("prompt", with_system(raw, messages)))


def _read_alpaca_prompt(raw: Raw) -> Prompt:
    return Prompt(alpaca_prompt(raw))


LAYOUTS = (
    Layout(("prompt",), _read_prompt, ("system",)),
    Layout(("messages",), _read_prompt_of_messages, ("system",)),
    Layout(("conversations",), _read_prompt_of_conversations, ("system",)),
    Layout(("instruction",), _read_alpaca_prompt, ("input", "system", "history")),
)
