"""Preference pairs: a prompt with two answers, or two whole conversations."""

from __future__ import annotations

import math
import re
from typing import Any

from core_training.data.layout import Layout, Raw
from core_training.data.turns import (
    alpaca_prompt,
    answer_of,
    checked_prompt,
    conversation_of,
    messages_of,
    prompt_of,
    turn,
    with_system,
)
from core_training.parts.data_kinds.values import Messages, PreferencePair


def _pair(raw: Raw, prompt: Messages) -> PreferencePair:
    """A preference pair whose answers stand for themselves, or begin with the prompt."""
    answers = []
    for name in ("chosen", "rejected"):
        value = raw[name]
        if isinstance(value, list) and len(value) > 1:
            value = _behind(prompt, messages_of(name, value))
        answers.append(answer_of(name, value))
    return _checked_pair(raw, prompt, *answers)


def _behind(prompt: Messages, whole: Messages) -> Messages:
    """A conversation's turns behind the prompt, which it may repeat, also without a system text."""
    for start in (prompt, [message for message in prompt if message["role"] != "system"]):
        if len(whole) > len(start) and _same(whole[: len(start)], start):
            return whole[len(start) :]
    return whole


def _same(one: Messages, other: Messages) -> bool:
    """Whether turns say the same, whatever is to be learnt of them."""
    plain = [[{part: m[part] for part in m if part != "learnt"} for m in messages] for messages in (one, other)]
    return plain[0] == plain[1]


def _checked_pair(raw: Raw, prompt: Messages, chosen: Messages, rejected: Messages) -> PreferencePair:
    if _same(chosen, rejected):
        raise ValueError("chosen and rejected are the same answer; a pair must differ")
    if any(message.get("learnt") is False for message in (*chosen, *rejected)):
        raise ValueError("an answer of a pair is marked as not to be learnt (weight, train, loss)")
    return PreferencePair(prompt, chosen, rejected, _margin(raw["margin"]) if "margin" in raw else None)


_WIDEST = 1_000_000
"""Wider than any margin of rewards, and float32 still counts in sixteenths there."""


def _margin(value: Any) -> float:
    try:
        margin = float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if isinstance(value, bool) or not abs(margin) <= _WIDEST:
        raise ValueError(f"the margin must be a number from {-_WIDEST} to {_WIDEST}")
    return margin


def _read_pair(raw: Raw) -> PreferencePair:
    return _pair(raw, with_system(raw, prompt_of("prompt", raw["prompt"])))


def _read_messages_pair(raw: Raw) -> PreferencePair:
    return _pair(raw, with_system(raw, prompt_of("messages", raw["messages"])))


def _read_conversations_pair(raw: Raw) -> PreferencePair:
    return _pair(raw, with_system(raw, prompt_of("conversations", raw["conversations"])))


def _read_alpaca_pair(raw: Raw) -> PreferencePair:
    return _pair(raw, alpaca_prompt(raw))


def _read_whole_pair(raw: Raw) -> PreferencePair:
    """Two whole conversations: what they begin with in common, up to an assistant's turn, is the prompt."""
    chosen, rejected = (_whole(name, raw[name]) for name in ("chosen", "rejected"))
    if _same(chosen, rejected):
        raise ValueError("chosen and rejected are the same answer; a pair must differ")
    shorter = min(len(chosen), len(rejected))
    shared = next((i for i in range(shorter) if not _same([chosen[i]], [rejected[i]])), shorter)
    both_answer = [
        i
        for i in range(shared + 1)
        if i < min(len(chosen), len(rejected)) and chosen[i]["role"] == rejected[i]["role"] == "assistant"
    ]
    if not both_answer or both_answer[-1] == 0:
        raise ValueError("chosen and rejected do not begin with the same turns and go on with the assistant's")
    at = both_answer[-1]
    prompt = with_system(raw, checked_prompt("prompt", chosen[:at]))
    return _checked_pair(raw, prompt, chosen[at:], rejected[at:])


def _whole(name: str, value: Any) -> Messages:
    """A conversation as a list, or as a text with `Human:` and `Assistant:` before the turns (Bai et al. 2022)."""
    if isinstance(value, str):
        parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", value.strip())
        if len(parts) < 5 or parts[0]:
            raise ValueError(f"{name} is a text without a prompt; give a column 'prompt', or whole conversations")
        roles = {"Human": "user", "Assistant": "assistant"}
        value = [turn(roles[role], text.strip()) for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    return conversation_of(name, value)


LAYOUTS = (
    Layout(("prompt", "chosen", "rejected"), _read_pair, ("system", "margin")),
    Layout(("conversations", "chosen", "rejected"), _read_conversations_pair, ("system", "margin")),
    Layout(("messages", "chosen", "rejected"), _read_messages_pair, ("system", "margin")),
    Layout(("instruction", "chosen", "rejected"), _read_alpaca_pair, ("input", "system", "history", "margin")),
    Layout(("chosen", "rejected"), _read_whole_pair, ("system", "margin")),
)
