"""From a record's fields to what a stage reads: texts, conversations, preference pairs, marked answers, prompts.

Knows the layouts that people's files have (plain, Alpaca, ShareGPT, LLaMA-Factory's, TRL's); nothing of tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core_training.data.records import Record
from core_training.foundation.errors import InputError
from core_training.parts.stages import STAGES

Message = dict[str, str]
"""A turn of a conversation: `role` and `content`."""


@dataclass(frozen=True)
class Values:
    """What a stage is given of a record.

    `canonical` is the same for every layout: `text`; `messages`; `prompt`, `chosen`, `rejected` and perhaps `margin`;
    `prompt`, `completion`, `label`; or `prompt`. All but text, margin and label are lists of messages.
    """

    canonical: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two records one, in whatever layouts they stand: what is held out is decided on it.

        It is what the record says, written as shortly as files have it: a question and its answer are `prompt` and
        `completion`; a prompt that is one turn of the user's, and an answer that is one turn, are their texts; all
        else is lists of messages. A margin is left out: it says how sure one is of a pair. This rule never changes,
        or records would move between training and evaluation.
        """
        parts = {name: value for name, value in self.canonical.items() if name != "margin"}
        if [turn["role"] for turn in parts.get("messages", [])] == ["user", "assistant"]:
            question, answer = parts.pop("messages")
            parts |= {"prompt": [question], "completion": [answer]}
        roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
        return {name: _short(value, roles[name]) if name in roles else value for name, value in parts.items()}


def read_values(record: Record, stage: str, columns: Mapping[str, str]) -> Values:
    """A record's values for a stage; `columns` has the files' names of those columns that are called otherwise.

    Of the layouts that the record has, the first of the stage's that uses most of the renamed columns is read.
    Raises InputError naming the record: without the columns, with which stages would fit; or with what is wrong in one.
    """
    fitting = [layout for layout in _layouts(stage) if layout.fits(record, columns)]
    if not fitting:
        raise InputError(_wrong_columns(record, stage, columns))
    layout = max(fitting, key=lambda one: len(set(one.required) & set(columns)))
    raw = {column: record.fields[columns.get(column, column)] for column in layout.required}
    for column in layout.optional:
        if record.fields.get(columns.get(column, column)) not in (None, "", []):
            raw[column] = record.fields[columns.get(column, column)]
    try:
        return Values(layout.read(raw))
    except ValueError as error:
        raise InputError(f"{record.place}: {error}") from None


def known_columns(stage: str) -> list[str]:
    """All columns that a stage can read."""
    names = [name for layout in _layouts(stage) for name in (*layout.required, *layout.optional)]
    return list(dict.fromkeys(names))


def column_sets(stage: str) -> list[tuple[str, ...]]:
    """The sets of columns that a stage can read a record from, best first; optional columns are left out."""
    return [layout.required for layout in _layouts(stage)]


def _short(messages: list[Message], role: str) -> str | list[Message]:
    """The text of a single turn of that role; else the messages."""
    return messages[0]["content"] if [turn["role"] for turn in messages] == [role] else messages


@dataclass(frozen=True)
class _Layout:
    """One set of columns, and what they say. `read` raises ValueError with what is wrong."""

    required: tuple[str, ...]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    optional: tuple[str, ...] = ()

    def fits(self, record: Record, columns: Mapping[str, str]) -> bool:
        return all(columns.get(column, column) in record.fields for column in self.required)


def _layouts(stage: str) -> tuple[_Layout, ...]:
    return _KINDS[STAGES[stage].reads]


def _wrong_columns(record: Record, stage: str, columns: Mapping[str, str]) -> str:
    wanted = " or ".join("+".join(columns.get(c, c) for c in layout.required) for layout in _layouts(stage))
    has = ", ".join(record.fields) or "nothing"
    fits = {
        kind: max((len(layout.required) for layout in layouts if layout.fits(record, columns)), default=0)
        for kind, layouts in _KINDS.items()
    }
    closest = [kind for kind in fits if fits[kind] == max(fits.values()) > 0]
    others = [part.name for part in STAGES.values() if part.reads in closest]
    advice = f"These columns fit stage {', '.join(others)}; or map" if others else "Map"
    return f"{record.place}: stage {stage} needs {wanted}; the record has {has}. {advice} names with data.columns"


# Texts and turns


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the {name} is empty or not a string")
    return value


def _turn(role: str, content: str) -> Message:
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
            return _turn(_ROLES.get(role, role), content)
    raise ValueError(f"'{name}' must be a list of {{role, content}} or {{from, value}} with a text in each")


def _messages(name: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{name}' must be a list of {{role, content}} or {{from, value}}, not empty")
    messages = [_message(name, one) for one in value]
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
        raise ValueError(f"an assistant's turn in '{name}' is empty")
    return messages


def _conversation(name: str, value: Any) -> list[Message]:
    messages = _messages(name, value)
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"'{name}' must be a list of {{role, content}} with an assistant's turn among them")
    return messages


def _prompt(name: str, value: Any) -> list[Message]:
    """A text as the user's turn, or the turns before the answer."""
    messages = _messages(name, value) if isinstance(value, list) else [_turn("user", _text(name, value))]
    return _checked_prompt(name, messages)


def _checked_prompt(name: str, messages: list[Message]) -> list[Message]:
    if not messages or not messages[-1]["content"].strip():
        raise ValueError(f"the {name} is empty")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"the {name} ends with an assistant's turn; it must end where the assistant is to speak")
    return messages


def _answer(name: str, value: Any) -> list[Message]:
    """A text, one message, or a list of them: what the assistant says."""
    if isinstance(value, str):
        return [_turn("assistant", _text(name, value))]
    messages = _messages(name, [value] if isinstance(value, dict) else value)
    if messages[0]["role"] != "assistant":
        raise ValueError(f"the {name} begins with another's turn; it must begin with the assistant's")
    return messages


def _without_last_answer(messages: list[Message]) -> list[Message]:
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


# The part of a layout that comes before the answer


def _alpaca_prompt(raw: dict[str, Any]) -> list[Message]:
    """Alpaca's instruction and input, after a system text and earlier pairs of instruction and answer."""
    parts = [raw["instruction"], raw.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("the instruction or the input is not a string")
    messages, history = _system(raw), raw.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("'history' must be a list of pairs: an instruction and its answer")
    for pair in history:
        messages += [
            _turn("user", _text("history's instruction", pair[0])),
            _turn("assistant", _text("history's answer", pair[1])),
        ]
    text = "\n".join(part for part in parts if part.strip())
    return [*messages, _turn("user", _text("instruction", text))]


def _system(raw: dict[str, Any]) -> list[Message]:
    return [_turn("system", _text("system", raw["system"]))] if raw.get("system") else []


def _with_system(raw: dict[str, Any], messages: list[Message]) -> list[Message]:
    return [*_system(raw), *messages]


# Readers, one for each layout


def _read_text(raw: dict[str, Any]) -> dict[str, Any]:
    return {"text": _text("text", raw["text"])}


def _read_messages(raw: dict[str, Any]) -> dict[str, Any]:
    return {"messages": _conversation("messages", raw["messages"])}


def _read_conversations(raw: dict[str, Any]) -> dict[str, Any]:
    return {"messages": _with_system(raw, _conversation("conversations", raw["conversations"]))}


def _read_prompt_completion(raw: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*_prompt("prompt", raw["prompt"]), *_answer("completion", raw["completion"])]}


def _read_alpaca(raw: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*_alpaca_prompt(raw), *_answer("output", raw["output"])]}


def _pair(raw: dict[str, Any], prompt: list[Message]) -> dict[str, Any]:
    """A preference pair whose answers stand for themselves, or begin with the prompt."""
    answers = []
    for name in ("chosen", "rejected"):
        value = raw[name]
        if isinstance(value, list) and len(value) > len(prompt):
            whole = _messages(name, value)
            value = whole[len(prompt) :] if whole[: len(prompt)] == prompt else whole
        answers.append(_answer(name, value))
    return _checked_pair(raw, prompt, *answers)


def _checked_pair(
    raw: dict[str, Any], prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> dict[str, Any]:
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same answer; a pair must differ")
    pair: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if "margin" in raw:
        pair["margin"] = _margin(raw["margin"])
    return pair


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


def _read_pair(raw: dict[str, Any]) -> dict[str, Any]:
    return _pair(raw, _prompt("prompt", raw["prompt"]))


def _read_messages_pair(raw: dict[str, Any]) -> dict[str, Any]:
    return _pair(raw, _prompt("messages", raw["messages"]))


def _read_conversations_pair(raw: dict[str, Any]) -> dict[str, Any]:
    return _pair(raw, _with_system(raw, _prompt("conversations", raw["conversations"])))


def _read_alpaca_pair(raw: dict[str, Any]) -> dict[str, Any]:
    return _pair(raw, _alpaca_prompt(raw))


def _read_whole_pair(raw: dict[str, Any]) -> dict[str, Any]:
    """Two whole conversations: what they begin with in common, up to an assistant's turn, is the prompt."""
    chosen, rejected = (_whole(name, raw[name]) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same answer; a pair must differ")
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    both_answer = [
        i
        for i in range(shared + 1)
        if i < min(len(chosen), len(rejected)) and chosen[i]["role"] == rejected[i]["role"] == "assistant"
    ]
    if not both_answer or both_answer[-1] == 0:
        raise ValueError("chosen and rejected do not begin with the same turns and go on with the assistant's")
    at = both_answer[-1]
    return _checked_pair(raw, _checked_prompt("prompt", chosen[:at]), chosen[at:], rejected[at:])


def _whole(name: str, value: Any) -> list[Message]:
    """A conversation as a list, or as a text with `Human:` and `Assistant:` before the turns (Bai et al. 2022)."""
    if isinstance(value, str):
        parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", value.strip())
        if len(parts) < 5 or parts[0]:
            raise ValueError(f"{name} is a text without a prompt; give a column 'prompt', or whole conversations")
        roles = {"Human": "user", "Assistant": "assistant"}
        value = [_turn(roles[role], text.strip()) for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    return _conversation(name, value)


def _marked(raw: dict[str, Any], conversation: list[Message]) -> dict[str, Any]:
    """The conversation's last answer, with its mark."""
    label = raw["label"] if "label" in raw else raw["kto_tag"]
    if isinstance(label, str):
        label = {"true": True, "false": False}.get(label.strip().lower(), label)
    if not isinstance(label, bool):
        raise ValueError("the label must be true or false")
    prompt = _without_last_answer(conversation)
    if prompt == conversation:
        raise ValueError("the conversation does not end with an assistant's turn, which the label is of")
    return {"prompt": _checked_prompt("prompt", prompt), "completion": conversation[len(prompt) :], "label": label}


def _marked_layouts(layout: _Layout) -> list[_Layout]:
    """A conversation's layout with each name that the label may have."""

    def read(raw: dict[str, Any]) -> dict[str, Any]:
        return _marked(raw, layout.read(raw)["messages"])

    return [_Layout((*layout.required, name), read, layout.optional) for name in ("label", "kto_tag")]


def _read_prompt(raw: dict[str, Any]) -> dict[str, Any]:
    value = raw["prompt"]
    messages = _without_last_answer(_messages("prompt", value)) if isinstance(value, list) else _prompt("prompt", value)
    return {"prompt": _checked_prompt("prompt", messages)}


def _read_prompt_of_messages(raw: dict[str, Any]) -> dict[str, Any]:
    messages = _without_last_answer(_messages("messages", raw["messages"]))
    return {"prompt": _checked_prompt("prompt", messages)}


def _read_prompt_of_conversations(raw: dict[str, Any]) -> dict[str, Any]:
    messages = _without_last_answer(_messages("conversations", raw["conversations"]))
    return {"prompt": _checked_prompt("prompt", _with_system(raw, messages))}


def _read_alpaca_prompt(raw: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": _alpaca_prompt(raw)}


_CONVERSATIONS = (
    _Layout(("messages",), _read_messages),
    _Layout(("prompt", "completion"), _read_prompt_completion),
    _Layout(("conversations",), _read_conversations, ("system",)),
    _Layout(("instruction", "output"), _read_alpaca, ("input", "system", "history")),
)

_KINDS: dict[str, tuple[_Layout, ...]] = {
    "text": (_Layout(("text",), _read_text),),
    "conversation": _CONVERSATIONS,
    "preference": (
        _Layout(("prompt", "chosen", "rejected"), _read_pair, ("margin",)),
        _Layout(("conversations", "chosen", "rejected"), _read_conversations_pair, ("system", "margin")),
        _Layout(("messages", "chosen", "rejected"), _read_messages_pair, ("margin",)),
        _Layout(("instruction", "chosen", "rejected"), _read_alpaca_pair, ("input", "system", "history", "margin")),
        _Layout(("chosen", "rejected"), _read_whole_pair, ("margin",)),
    ),
    "feedback": tuple(marked for layout in _CONVERSATIONS for marked in _marked_layouts(layout)),
    "prompt": (
        _Layout(("prompt",), _read_prompt),
        _Layout(("messages",), _read_prompt_of_messages),
        _Layout(("conversations",), _read_prompt_of_conversations, ("system",)),
        _Layout(("instruction",), _read_alpaca_prompt, ("input", "system", "history")),
    ),
}
"""The layouts of each kind of data, best first."""
