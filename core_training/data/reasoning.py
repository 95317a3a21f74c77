"""Thoughts before an assistant's words: kept, left out, or kept in the last turn alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, TypeVar

from core_training.parts.data_kinds.values import Message, Messages, Values, conversations_of
from core_training.recipe.sections.data import Reasoning

V = TypeVar("V", bound=Values)

_THOUGHT = re.compile(r"^\s*<think>(?P<thought>.*?)</think>\s*", re.DOTALL)
_REST_OF_THOUGHT = re.compile(r"^(?:(?!<think>).)*?\n</think>\s*?\n\s*", re.DOTALL)
"""A thought whose beginning the prompt had: its end has a line of its own."""


def with_reasoning(values: V, kept: Reasoning) -> V:
    """The values with those thoughts (`reasoning_content`, or `<think>…</think>` before the content) that are kept.

    Raises ValueError for a thought without an end, and where nothing, or no difference, is left.
    """
    if kept == "keep":
        return values
    changed: dict[str, Any] = {}
    for name in conversations_of(values):
        messages: Messages = getattr(values, name)
        own = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spared = own[-1:] if kept == "last" and name != "prompt" else []
        changed[name] = [
            message if index in spared or index not in own else _without(message)
            for index, message in enumerate(messages)
        ]
    if "chosen" in changed and changed["chosen"] == changed["rejected"]:
        raise ValueError("without their thoughts chosen and rejected are the same answer; a pair must differ")
    return replace(values, **changed)  # type: ignore[type-var]


def with_thoughts_apart(values: V) -> V:
    """The values with `<think>…</think>` before an assistant's words as `reasoning_content`, which templates print."""
    changed: dict[str, Messages] = {}
    for name in conversations_of(values):
        messages: Messages = getattr(values, name)
        if any("<think>" in message["content"] for message in messages):
            changed[name] = [_apart(message) for message in messages]
    return replace(values, **changed) if changed else values  # type: ignore[type-var]


def _apart(message: Message) -> Message:
    if message["role"] != "assistant" or "reasoning_content" in message or "<think>" not in message["content"]:
        return message
    found = _THOUGHT.match(message["content"])
    rest = message["content"][found.end() :] if found else ""
    if not found or not found["thought"].strip() or not (rest.strip() or "tool_calls" in message):
        return message
    return {**message, "content": rest, "reasoning_content": found["thought"].strip()}


def _without(message: Message) -> Message:
    plain = {part: value for part, value in message.items() if part != "reasoning_content"}
    content = message["content"]
    while found := _THOUGHT.match(content) or _REST_OF_THOUGHT.match(content):
        content = content[found.end() :]
    if content.lstrip().startswith("<think>"):
        raise ValueError("an assistant's turn has a thought without an end (</think>), which cannot be left out")
    if not content.strip() and "tool_calls" not in message:
        raise ValueError("an assistant's turn is nothing but a thought, which is to be left out (data.reasoning)")
    return {**plain, "content": content}
