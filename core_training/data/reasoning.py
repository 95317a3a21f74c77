"""Thoughts before an assistant's words: kept, left out, or kept in the last turn alone."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

from core_training.parts.data_kinds.values import Messages, Values

Reasoning = Literal["keep", "drop", "last"]
V = TypeVar("V", bound=Values)

_THOUGHT = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)
_ANSWERS = ("chosen", "rejected", "completion")
_LISTS = ("messages", "prompt", *_ANSWERS)


def with_reasoning(values: V, kept: Reasoning) -> V:
    """The values with those thoughts (`reasoning_content`, or `<think>…</think>` before the content) that are kept."""
    if kept == "keep":
        return values
    changed: dict[str, Any] = {}
    for part in fields(values):  # type: ignore[arg-type]
        if part.name in _LISTS:
            messages: Messages = getattr(values, part.name)
            own = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            spared = own[-1:] if kept == "last" and part.name != "prompt" else []
            changed[part.name] = [
                message if index in spared or index not in own else _without(message)
                for index, message in enumerate(messages)
            ]
    return replace(values, **changed)  # type: ignore[type-var]


def _without(message: dict[str, Any]) -> dict[str, Any]:
    plain = {part: value for part, value in message.items() if part != "reasoning_content"}
    return {**plain, "content": _THOUGHT.sub("", message["content"])}
