"""Texts and turns of conversations in the ways that files have them (plain, Alpaca, ShareGPT, TRL's).

Each function raises ValueError with what is wrong in a column.
"""

from __future__ import annotations

from typing import Any

from core_training.data.layout import Raw
from core_training.parts.data_kinds.values import Message, Messages


def text_of(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the {name} is empty or not a string")
    return value


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
}
"""ShareGPT's names of the roles that chat templates call otherwise."""


def _message(name: str, value: Any) -> Message:
    """`{role, content}` or ShareGPT's `{from, value}`."""
    if isinstance(value, dict):
        role, content = (
            (value["role"], value.get("content")) if "role" in value else (value.get("from"), value.get("value"))
        )
        if role == "function_call":
            raise ValueError(f"'{name}' has a turn of role 'function_call'; write what the assistant says as its turn")
        if isinstance(role, str) and isinstance(content, str):
            return turn(_ROLES.get(role, role), content)
    raise ValueError(f"'{name}' must be a list of {{role, content}} or {{from, value}} with a text in each")


def messages_of(name: str, value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{name}' must be a list of {{role, content}} or {{from, value}}, not empty")
    messages = [_message(name, one) for one in value]
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
        raise ValueError(f"an assistant's turn in '{name}' is empty")
    return messages


def conversation_of(name: str, value: Any) -> Messages:
    messages = messages_of(name, value)
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"'{name}' must be a list of {{role, content}} with an assistant's turn among them")
    return messages


def prompt_of(name: str, value: Any) -> Messages:
    """A text as the user's turn, or the turns before the answer."""
    messages = messages_of(name, value) if isinstance(value, list) else [turn("user", text_of(name, value))]
    return checked_prompt(name, messages)


def checked_prompt(name: str, messages: Messages) -> Messages:
    if not messages or not messages[-1]["content"].strip():
        raise ValueError(f"the {name} is empty")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"the {name} ends with an assistant's turn; it must end where the assistant is to speak")
    return messages


def answer_of(name: str, value: Any) -> Messages:
    """A text, one message, or a list of them: what the assistant says."""
    if isinstance(value, str):
        return [turn("assistant", text_of(name, value))]
    messages = messages_of(name, [value] if isinstance(value, dict) else value)
    if messages[0]["role"] != "assistant":
        raise ValueError(f"the {name} begins with another's turn; it must begin with the assistant's")
    return messages


def without_last_answer(messages: Messages) -> Messages:
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def alpaca_prompt(raw: Raw) -> Messages:
    """Alpaca's instruction and input, after a system text and earlier pairs of instruction and answer."""
    parts = [raw["instruction"], raw.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("the instruction or the input is not a string")
    messages, history = _system(raw), raw.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("'history' must be a list of pairs: an instruction and its answer")
    for pair in history:
        messages += [
            turn("user", text_of("history's instruction", pair[0])),
            turn("assistant", text_of("history's answer", pair[1])),
        ]
    text = "\n".join(part for part in parts if part.strip())
    return [*messages, turn("user", text_of("instruction", text))]


def _system(raw: Raw) -> Messages:
    return [turn("system", text_of("system", raw["system"]))] if raw.get("system") else []


def with_system(raw: Raw, messages: Messages) -> Messages:
    return [*_system(raw), *messages]
