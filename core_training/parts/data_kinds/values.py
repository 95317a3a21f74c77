"""The five kinds of values that stages read of a record, whatever layout it stands in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, str]
"""A turn of a conversation: `role` and `content`."""
Messages = list[Message]


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

    @property
    def identity(self) -> dict[str, Any]:
        if [turn["role"] for turn in self.messages] != ["user", "assistant"]:
            return {"messages": self.messages}
        question, answer = self.messages
        return {"prompt": question["content"], "completion": answer["content"]}


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a better and a worse answer, perhaps by a margin."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """A margin is left out: it says how sure one is of a pair."""
        return {
            "prompt": _short(self.prompt, "user"),
            "chosen": _short(self.chosen, "assistant"),
            "rejected": _short(self.rejected, "assistant"),
        }


@dataclass(frozen=True)
class JudgedAnswer:
    """A prompt with an answer that somebody found good or bad."""

    prompt: Messages
    completion: Messages
    label: bool

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "prompt": _short(self.prompt, "user"),
            "completion": _short(self.completion, "assistant"),
            "label": self.label,
        }


@dataclass(frozen=True)
class Prompt:
    """The turns before an answer."""

    prompt: Messages

    @property
    def identity(self) -> dict[str, Any]:
        return {"prompt": _short(self.prompt, "user")}


def _short(messages: Messages, role: str) -> str | Messages:
    """The text of a single turn of that role; else the messages."""
    return messages[0]["content"] if [turn["role"] for turn in messages] == [role] else messages
