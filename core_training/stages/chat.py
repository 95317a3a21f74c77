"""Conversations to tokens under a model's chat template, with labels on what the assistant says.

The template gives text, and labels are decided on that text: by the template's own `{% generation %}` marks; where it
has none, by what each of the assistant's turns adds to it; and where it tells a turn otherwise inside a conversation
than at its end, by where it puts the contents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import numpy as np
from jinja2 import TemplateError

from core_training.data.examples import IGNORED, Tokens
from core_training.data.records import Record
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.parts.data_kinds.values import Messages, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters of a text: from the first to before the second."""

_SIGN = "\ue000"
"""A letter that no text has; it stands where the template puts a content."""


def conversation_tokens(messages: Messages, base: BaseModel, record: Record, tools: Tools | None = None) -> Tokens:
    """A conversation, with labels on each of the assistant's turns and the tokens that end it."""
    return answer_tokens([], messages, base, record, tools)


def answer_tokens(
    prompt: Messages, answer: Messages, base: BaseModel, record: Record, tools: Tools | None = None
) -> Tokens:
    """A prompt and an answer to it, with labels on the assistant's turns of the answer alone.

    Raises InputError where the template does not print what the record says, or prints it where it cannot be found.
    """
    messages, template = [*prompt, *answer], _Template(base, tools)
    if not template.tokenizer.is_fast:
        raise InputError(
            f"model.name_or_path: {base.folder}: its tokenizer does not say which characters a token is of, so what "
            "the assistant says cannot be found; save a fast one (tokenizer.json) beside the weights"
        )
    with _template_errors(base, record):
        text = template.text(messages)
        _check_printed(messages, template, text)
        spans = _spoken(messages, len(prompt), text, template)
    encoded = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    first, last = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    spoken = np.zeros(len(ids), dtype=bool)
    for start, end in spans:  # a token that reaches over the start of a span is learnt with it
        spoken |= (first < end) & ((last > start) | (first >= start))
    return Tokens(ids, np.where(spoken, ids, IGNORED))


def prompt_tokens(prompt: Messages, base: BaseModel, record: Record, tools: Tools | None = None) -> Tokens:
    """A prompt up to where the assistant is to speak; no labels."""
    with _template_errors(base, record):
        template = _Template(base, tools)
        text = template.text(prompt, to_answer=True)
        _check_printed(prompt, template, text, to_answer=True)
    ids = np.asarray(base.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    if not len(ids):
        raise InputError(f"{record.place}: the chat template makes no token of this prompt (model.chat_template)")
    return Tokens(ids, np.full_like(ids, IGNORED))


@contextmanager
def _template_errors(base: BaseModel, record: Record) -> Iterator[None]:
    if not base.tokenizer.chat_template:
        raise InputError(
            f"model.name_or_path: {base.folder} has no chat template; give one with model.chat_template: FILE.jinja"
        )
    template = f"{record.place}: the chat template (that of {base.folder}, or model.chat_template)"
    refused = f"{template} does not take this conversation"
    try:
        yield
    except TemplateError as error:
        raise InputError(f"{refused}: {error}") from None
    except _NotPrinted as what:
        raise InputError(
            f"{template} does not print {what}; take it out of the records (thoughts: data.reasoning "
            "drop or last), or give a template that prints it"
        ) from None
    except _Untraceable as turn:
        raise InputError(
            f"{record.place}: the chat template tells message {turn} otherwise at the end of a conversation than "
            "inside one, so what the assistant says cannot be found in it; mark that in the template with "
            "{% generation %} … {% endgeneration %} (model.chat_template)"
        ) from None
    except Exception as error:  # whatever an expression in it raises; what that says may quote the record
        raise InputError(f"{refused}: an expression in it raises {type(error).__name__}") from error


class _Untraceable(Exception):
    """A turn that cannot be found again in the whole conversation; its number, from 1."""


class _NotPrinted(Exception):
    """Something that a record says and the template leaves out."""


@dataclass(frozen=True)
class _Template:
    """The model's chat template, with the tools of one record."""

    base: BaseModel
    tools: Tools | None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer

    def text(self, messages: Messages, *, to_answer: bool = False) -> str:
        tools: Any = list(self.tools) if self.tools else None
        plain = [_plain(message) for message in messages]
        rendered = self.tokenizer.apply_chat_template(
            plain, tools=tools, tokenize=False, add_generation_prompt=to_answer
        )
        return cast(str, rendered)

    def marked(self, messages: Messages) -> list[Span]:
        """The spans that the template marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[[_plain(message) for message in messages]],
            tools=cast(Any, list(self.tools) if self.tools else None),
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **cast(dict[str, Any], self.tokenizer.special_tokens_map),
        )
        _, (spans,) = rendered
        return [(start, end) for start, end in spans]

    @property
    def marks(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    @property
    def source(self) -> str:
        """The template; some models have another one for conversations with tools."""
        return self.tokenizer.get_chat_template(tools=cast(Any, list(self.tools) if self.tools else None))


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A turn as templates know it."""
    return {part: value for part, value in message.items() if part != "learnt" and value is not None}


def _check_printed(messages: Messages, template: _Template, text: str, *, to_answer: bool = False) -> None:
    """Raise _NotPrinted for what is not in the text: a turn, its reasoning or one of its calls, the tools.

    What is no text of its own is printed where the conversation without it gives another text.
    """

    def changes(turns: Messages, tools: Tools | None) -> bool:
        try:
            return replace(template, tools=tools).text(turns, to_answer=to_answer) != text
        except Exception:  # a template may refuse a conversation that lacks it
            return True

    roles = tuple(message["role"] for message in messages)
    for number in _numbers_passed_over(replace(template, tools=None), roles, to_answer=to_answer):
        if messages[number]["content"].strip():
            raise _NotPrinted(f"message {number + 1} (of role {messages[number]['role']})")
    for number, message in enumerate(messages):
        said = message["content"].strip()
        if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
            raise _NotPrinted(f"all of message {number + 1} (of role {message['role']})")
        lesser: dict[str, list[Any]] = {}
        if "reasoning_content" in message:
            lesser["reasoning_content"] = [None]
        if calls := message.get("tool_calls"):
            lesser["tool_calls"] = [[*calls[:one], *calls[one + 1 :]] or None for one in range(len(calls))]
        for part, values in lesser.items():
            for value in values:
                if not changes([*messages[:number], {**message, part: value}, *messages[number + 1 :]], template.tools):
                    raise _NotPrinted(f"the {part} of message {number + 1}")
    if template.tools and not changes(messages, None):
        raise _NotPrinted("the record's tools")


_Form = tuple[str, tuple[str, ...], bool]
_passed_over: WeakKeyDictionary[BaseModel, dict[_Form, tuple[int, ...]]] = WeakKeyDictionary()
"""What templates leave out, by template, roles, and whether a prompt ends it: records of one form are many."""


def _numbers_passed_over(template: _Template, roles: tuple[str, ...], *, to_answer: bool) -> tuple[int, ...]:
    """The numbers of the turns whose contents the template leaves out, of a conversation with these roles."""
    known = _passed_over.setdefault(template.base, {})
    key = (template.source, roles, to_answer)
    if key not in known:
        signs, turns = _signed([{"role": role} for role in roles])
        try:
            frame = template.text(turns, to_answer=to_answer)
        except Exception:  # it takes no such conversation, or no such contents
            frame = "".join(signs)
        known[key] = tuple(number for number, sign in enumerate(signs) if sign not in frame)
    return known[key]


def _signed(messages: Messages) -> tuple[list[str], Messages]:
    """A sign for each message, and the messages with it in the place of the content."""
    signs = [f"{_SIGN}{number}\ue001" for number in range(len(messages))]
    return signs, [{**message, "content": sign} for message, sign in zip(messages, signs, strict=True)]


def _is_learnt(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("learnt") is not False


def _spoken(messages: Messages, first: int, text: str, template: _Template) -> list[Span]:
    """The spans of `text` in which the assistant speaks what is to be learnt, from message number `first` on."""
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    if template.marks:
        begin = _turn_start(messages, first, text, template) if first else 0
        spans = [(max(start, begin), end) for start, end in template.marked(messages) if end > begin]
        if all(_is_learnt(messages[index]) for index in turns):
            return spans
        if len(spans) != len(turns):
            raise _Untraceable(first + 1)
        return [span for span, index in zip(spans, turns, strict=True) if _is_learnt(messages[index])]
    return [_turn_or_content(messages, index, text, template) for index in turns if _is_learnt(messages[index])]


def _turn_or_content(messages: Messages, index: int, text: str, template: _Template) -> Span:
    """An assistant's turn; of one that is told otherwise at the end of a conversation its content, if that is all."""
    try:
        return _turn(messages, index, text, template)
    except _Untraceable:
        if {"tool_calls", "reasoning_content"}.intersection(messages[index]):
            raise
        return _places(messages, text, template)[index]


def _turn(messages: Messages, index: int, text: str, template: _Template) -> Span:
    """The span that an assistant's turn adds to the text before it."""
    start = _turn_start(messages, index, text, template)
    ending_here = template.text(messages[: index + 1])
    if text.startswith(ending_here):
        return start, len(ending_here)
    # Some templates tell the last turn at more length than those before it: its content, then, and what closes it.
    content = messages[index]["content"].strip()
    end = start + len(content)
    if not content or not text.startswith(content, start) or content not in ending_here:
        raise _Untraceable(index + 1)
    closing = _closing(messages[: index + 1], ending_here, content, template)
    shared = _shared(closing, text[end:])  # which may end inside a token
    pieces = template.tokenizer(closing, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return start, end + max((stop for _, stop in pieces if stop <= shared), default=0)


def _turn_start(messages: Messages, index: int, text: str, template: _Template) -> int:
    """The place where the assistant begins to speak; a generation prompt may say more than the conversation has."""
    prompt, before = template.text(messages[:index], to_answer=True), template.text(messages[:index]).rstrip()
    start = _shared(prompt, text)
    if start < len(before):
        raise _Untraceable(index + 1)
    if start < len(prompt):  # what the prompt says more may begin as the answer does
        first = "reasoning_content" if "reasoning_content" in messages[index] else "content"
        marked = [*messages[:index], {**messages[index], first: _SIGN}]
        head, found, _ = template.text(marked).partition(_SIGN)
        if found and text.startswith(head):
            start = min(start, len(head))
    return start


def _closing(messages: Messages, text: str, content: str, template: _Template) -> str:
    """What the template prints behind the content of the last message."""
    _, found, closing = template.text([*messages[:-1], {**messages[-1], "content": _SIGN}]).partition(_SIGN)
    if not found or not text.endswith(content + closing):
        closing = text[text.rindex(content) + len(content) :]
    return closing


def _places(messages: Messages, text: str, template: _Template) -> list[Span]:
    """Each message's content in the text, with the token that ends it, where one follows.

    The template prints the conversation again with a sign in the place of each content. Between the signs stands what
    is the template's own; with the contents put back that must be the text, character by character.
    """
    signs, turns = _signed(messages)
    frame = template.text(turns)
    ends = [str(token) for token in template.tokenizer.convert_ids_to_tokens(template.base.end_tokens)]
    places, here = [], 0
    for number, (message, sign) in enumerate(zip(messages, signs, strict=True), start=1):
        before, found, frame = frame.partition(sign)
        after = frame.partition(_SIGN)[0]
        here += len(before)
        variants = [message["content"], message["content"].strip()]
        content = next((one for one in variants if text.startswith(before + one + after, here - len(before))), None)
        if not found or not content:
            raise _Untraceable(number)
        closing = next((after.index(end) + len(end) for end in ends if after.lstrip().startswith(end)), 0)
        places.append((here, here + len(content) + closing))
        here += len(content)
    if text[here:] != frame:
        raise _Untraceable(len(messages))
    return places


def _shared(one: str, other: str) -> int:
    """The number of characters that two texts begin with in common."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
