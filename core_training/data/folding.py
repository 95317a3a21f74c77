"""Turns that a chat template does not take, in the form that it takes: as most tools write them for such templates."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, TypeVar

from core_training.parts.data_kinds.values import Message, Messages, Values, conversations_of

V = TypeVar("V", bound=Values)

_JOINED = ("user", "assistant")
_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
_APART = {"tool_calls", "reasoning_content"}
"""Parts of turns that are not joined with others."""


def folded(values: V, *, system: bool, repeats: bool) -> V:
    """The values with a system text at the beginning of the user's first turn, and a speaker's turns in a row as one.

    Each is done where it is true. Turns that call functions, or of which one alone is to be learnt, stay.
    """
    changed: dict[str, Any] = {}
    for name in conversations_of(values):
        messages: Messages = getattr(values, name)
        now = _without_system(messages) if system else messages
        now = _without_repeats(now) if repeats else now
        if now != messages:
            changed[name] = now
    return replace(values, **changed) if changed else values  # type: ignore[type-var]


def unwrapped(values: V) -> V:
    """The values without `<tool_response>` around functions' results, and without tools that a system text has.

    Hermes' data have both written out, for templates that would write them again.
    """
    changed: dict[str, Any] = {}
    for name in conversations_of(values):
        messages: Messages = getattr(values, name)
        now = [_unwrapped(message) for message in messages]
        if now != messages:
            changed[name] = now
        if getattr(values, "tools", None) and any(
            m["role"] == "system" and "<tools>" in m["content"] for m in messages
        ):
            changed["tools"] = None
    return replace(values, **changed) if changed else values  # type: ignore[type-var]


def _unwrapped(message: Message) -> Message:
    found = _RESPONSE.fullmatch(message["content"]) if message["role"] == "tool" else None
    return message if found is None else {**message, "content": found[1]}


def _without_system(messages: Messages) -> Messages:
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return messages
    return [_joined(messages[0], messages[1]), *messages[2:]]


def _without_repeats(messages: Messages) -> Messages:
    kept: Messages = []
    for message in messages:
        if kept and _alike(kept[-1], message):
            kept[-1] = _joined(kept[-1], message)
        else:
            kept.append(message)
    return kept


def _alike(first: Message, second: Message) -> bool:
    """Whether two turns differ in what they say alone, and say nothing but texts."""
    if first["role"] not in _JOINED or _APART & (first.keys() | second.keys()):
        return False
    return {**first, "content": ""} == {**second, "content": ""}


def _joined(first: Message, second: Message) -> Message:
    return {**second, "content": "\n\n".join([first["content"].strip(), second["content"]])}
