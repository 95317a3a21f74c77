"""Thoughts before an assistant's words: kept, left out, or kept in the last turn alone."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any, TypeVar

from core_training.parts.data_kinds.values import CONVERSATIONS, Messages, Values
from core_training.recipe.schema import Reasoning

V = TypeVar("V", bound=Values)

_THOUGHT = re.compile(r"^.*?</think>\s*", re.DOTALL)
"""Up to the end of a thought, whose beginning the prompt may have had."""


def with_reasoning(values: V, kept: Reasoning) -> V:
    """The values with those thoughts (`reasoning_content`, or `<think>…</think>` before the content) that are kept.

    Raises ValueError for a thought without an end, and where nothing, or no difference, is left.
    """
    if kept == "keep":
        return values
    changed: dict[str, Any] = {}
    for part in fields(values):  # type: ignore[arg-type]
        if part.name in CONVERSATIONS:
            messages: Messages = getattr(values, part.name)
            own = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            spared = own[-1:] if kept == "last" and part.name != "prompt" else []
            changed[part.name] = [
                message if index in spared or index not in own else _without(message)
                for index, message in enumerate(messages)
            ]
    if "chosen" in changed and changed["chosen"] == changed["rejected"]:
        raise ValueError("without their thoughts chosen and rejected are the same answer; a pair must differ")
    return replace(values, **changed)  # type: ignore[type-var]


def _without(message: dict[str, Any]) -> dict[str, Any]:
    plain = {part: value for part, value in message.items() if part != "reasoning_content"}
    content = _THOUGHT.sub("", message["content"])
    if "<think>" in content:
        raise ValueError("an assistant's turn has a thought without an end (</think>), which cannot be left out")
    if not content.strip() and "tool_calls" not in message:
        raise ValueError("an assistant's turn is nothing but a thought, which is to be left out (data.reasoning)")
    return {**plain, "content": content}
