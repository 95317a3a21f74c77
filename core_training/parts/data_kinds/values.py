"""The five kinds of values that stages read of a record, whatever layout it stands in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]
"""A turn of a conversation: `role` and `content`, texts; some also `tool_calls`, `reasoning_content`, `name` and
`tool_call_id`, as chat templates know them, and `learnt`: False where a turn of the assistant's is not to be learnt."""
Messages = list[Message]
Tools = Sequence[dict[str, Any]]
"""Descriptions of functions that the assistant may call, as chat templates know them."""


class Values(Protocol):
    """The values that a stage gets of a record."""

    @property
    def identity(self) -> dict[str, Any]:
        """The identity that makes two records one in any layouts; it decides whether they are held out.

        It is what the record says, written as shortly as files have it: a question and its answer are `prompt` and
        `completion`; a prompt that is one turn of the user's, and an answer that is one turn, are their texts; all
        else is lists of messages. This rule never changes, or records would move between training and evaluation.
        """
        ...


_CONVERSATIONS = ("messages", "prompt", "chosen", "rejected", "completion")


def conversations_of(values: Values) -> list[str]:
    """The names under which values hold turns."""
    return [name for name in _CONVERSATIONS if hasattr(values, name)]


@dataclass(frozen=True)
class Text:
    """A plain text."""

    text: str

    @property
    def identity(self) -> dict[str, Any]:
        return {"text": self.text}


@dataclass(frozen=True)
class Conversation:
    """Turns, the assistant's among them."""

    messages: Messages
    tools: Tools | None = None

    @property
    def identity(self) -> dict[str, Any]:
        messages = _said(self.messages)
        if [turn["role"] for turn in messages] != ["user", "assistant"] or "tool_calls" in messages[1]:
            return {"messages": messages, **_tools(self.tools)}
        question, answer = messages
        return {"prompt": question["content"], "completion": answer["content"], **_tools(self.tools)}


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a better and a worse answer, perhaps by a margin."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    tools: Tools | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """A margin is left out: it says how sure one is of a pair."""
        return {
            "prompt": _short(self.prompt, "user"),
            "chosen": _short(self.chosen, "assistant"),
            "rejected": _short(self.rejected, "assistant"),
            **_tools(self.tools),
        }


@dataclass(frozen=True)
class JudgedAnswer:
    """A prompt with an answer that somebody found good or bad."""

    prompt: Messages
    completion: Messages
    label: bool
    tools: Tools | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "prompt": _short(self.prompt, "user"),
            "completion": _short(self.completion, "assistant"),
            "label": self.label,
            **_tools(self.tools),
        }


@dataclass(frozen=True)
class Prompt:
    """The turns before an answer."""

    prompt: Messages
    tools: Tools | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return {"prompt": _short(self.prompt, "user"), **_tools(self.tools)}


def _short(messages: Messages, role: str) -> Any:
    """The text of a single turn of that role; else the messages."""
    said = _said(messages)
    alone = [turn["role"] for turn in said] == [role] and "tool_calls" not in said[0]
    return said[0]["content"] if alone else said


def _said(messages: Messages) -> Messages:
    """The turns as far as they count for a record's identity."""
    return [{part: turn[part] for part in ("role", "content", "tool_calls") if part in turn} for turn in messages]


def _tools(tools: Tools | None) -> dict[str, Any]:
    return {"tools": list(tools)} if tools else {}
