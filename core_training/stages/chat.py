"""Conversations to tokens under a model's chat template, with labels on what the assistant says.

The template gives text, and labels are decided on that text: by the template's own `{% generation %}` marks; where it
has none, by what each of the assistant's turns adds to it; and where it tells a turn otherwise inside a conversation
than at its end, by what another turn in its place would change.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jinja2 import TemplateError

from core_training.data.examples import IGNORED, Tokens
from core_training.data.records import Record
from core_training.foundation.bounded_reading import shortened_text
from core_training.foundation.errors import InputError
from core_training.foundation.limits import TooMuchError
from core_training.models.base_model import BaseModel
from core_training.models.chat_template import SIGN, ChatTemplate, Span
from core_training.parts.data_kinds.values import Messages, Tools

if TYPE_CHECKING:
    from tokenizers import Encoding


def conversation_tokens(messages: Messages, base: BaseModel, record: Record, tools: Tools | None = None) -> Tokens:
    """A conversation, with labels on each of the assistant's turns and the tokens that end it."""
    return answer_tokens([], messages, base, record, tools)


def answer_tokens(
    prompt: Messages, answer: Messages, base: BaseModel, record: Record, tools: Tools | None = None
) -> Tokens:
    """A prompt and an answer to it, with labels on the assistant's turns of the answer alone.

    Raises InputError where the template does not print what the record says, or prints it where it cannot be found.
    """
    messages, template = [*prompt, *answer], base.chat_template.with_tools(tools)
    if any(SIGN in message["content"] for message in messages):
        raise InputError(f"{record.place}: a text has U+FDD0, which is no character; leave it out")
    if not template.tokenizer.is_fast:
        raise InputError(
            f"model.name_or_path: {base.folder}: its tokenizer does not say which characters a token is of, so what "
            "the assistant says cannot be found; save a fast one (tokenizer.json) beside the weights"
        )
    with _template_errors(base, record):
        text, marked = template.text_and_marks(messages)
        _check_printed(messages, template, text)
        spans = _spoken(messages, len(prompt), text, marked, template)
    encoding = template.encoding(text)
    ids = np.asarray(encoding.ids, dtype=np.int64)
    labels = np.full_like(ids, IGNORED)
    for span in spans:
        tokens = _tokens_of(span, encoding)
        labels[tokens] = ids[tokens]
    return Tokens(ids, labels)


def _tokens_of(span: Span, encoding: Encoding) -> slice:
    """The tokens of some characters; a token that reaches over their start is one of them.

    A tokenizer's tokens follow each other in the text, so they are looked for by halves: the places of all of them cost
    a third as much as tokenising.
    """
    start, end = span
    numbers = range(len(encoding))

    def place(number: int) -> Span:
        return cast(Span, encoding.token_to_chars(number))

    def begins_behind(number: int) -> bool:
        return place(number)[0] >= end

    def reaches_in(number: int) -> bool:
        first, last = place(number)
        return last > start or first >= start

    return slice(bisect_left(numbers, True, key=reaches_in), bisect_left(numbers, True, key=begins_behind))


def prompt_tokens(prompt: Messages, base: BaseModel, record: Record, tools: Tools | None = None) -> Tokens:
    """A prompt up to where the assistant is to speak; no labels."""
    with _template_errors(base, record):
        template = base.chat_template.with_tools(tools)
        text = template.text(prompt, to_answer=True)
        _check_printed(prompt, template, text, to_answer=True)
    ids = np.asarray(base.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    if not len(ids):
        raise InputError(f"{record.place}: the chat template makes no token of this prompt (model.chat_template)")
    return Tokens(ids, np.full_like(ids, IGNORED))


@contextmanager
def _template_errors(base: BaseModel, record: Record) -> Iterator[None]:
    if not base.chat_template.exists:
        raise InputError(
            f"model.name_or_path: {base.folder} has no chat template; give one with model.chat_template: "
            "a file, or a name (chatml, llama3, …)"
        )
    try:
        yield
    except TemplateError as error:
        said = shortened_text(error)
        raise InputError(f"{_named(base, record)} does not take this conversation: {said}") from None
    except TooMuchError as error:
        raise InputError(f"{_named(base, record)} does not tell this conversation: {error}") from None
    except _NotPrinted as what:
        raise InputError(
            f"{_named(base, record)} does not print {what}; take it out of the records (thoughts: data.reasoning "
            "drop or last), or give a template that prints it"
        ) from None
    except _Untraceable as turn:
        raise InputError(
            f"{record.place}: the chat template tells message {turn} otherwise at the end of a conversation than "
            "inside one, so what the assistant says cannot be found in it; mark that in the template with "
            "{% generation %} … {% endgeneration %} (model.chat_template)"
        ) from None
    except Exception as error:  # whatever an expression in it raises; what that says may quote the record
        raise InputError(
            f"{_named(base, record)} does not take this conversation: an expression in it raises {type(error).__name__}"
        ) from error


def _named(base: BaseModel, record: Record) -> str:
    return f"{record.place}: the chat template (that of {base.folder}, or model.chat_template)"


class _Untraceable(Exception):
    """A turn that cannot be found again in the whole conversation; its number, from 1."""


class _NotPrinted(Exception):
    """Something that a record says and the template leaves out."""


def _check_printed(messages: Messages, template: ChatTemplate, text: str, *, to_answer: bool = False) -> None:
    """Raise _NotPrinted for what is not in the text: a turn, its reasoning or one of its calls, the tools.

    What is no text of its own is printed where the conversation without it gives another text.
    """

    def changes(turns: Messages, tools: Tools | None) -> bool:
        try:
            return template.with_tools(tools).text(turns, to_answer=to_answer) != text
        except Exception:  # a template may refuse a conversation that lacks it
            return True

    def printed(said: str) -> bool:
        return said.strip() in text or json.dumps(said.strip(), ensure_ascii=False)[1:-1] in text

    for number in template.with_tools(None).passed_over(messages, to_answer=to_answer):
        if messages[number]["content"].strip():
            raise _NotPrinted(f"message {number + 1} (of role {messages[number]['role']})")
    for number, message in enumerate(messages):
        if not printed(message["content"]):
            raise _NotPrinted(f"all of message {number + 1} (of role {message['role']})")
        without: list[tuple[str, Any]] = []
        if "reasoning_content" in message:
            if not printed(message["reasoning_content"]):
                raise _NotPrinted(f"the reasoning_content of message {number + 1}")
            without.append(("reasoning_content", None))
        if calls := message.get("tool_calls"):
            without += [("tool_calls", [*calls[:one], *calls[one + 1 :]] or None) for one in range(len(calls))]
        for part, lesser in without:
            if not changes([*messages[:number], {**message, part: lesser}, *messages[number + 1 :]], template.tools):
                raise _NotPrinted(f"the {part} of message {number + 1}")
    if template.tools and not changes(messages, None):
        raise _NotPrinted("the record's tools")


def _is_learnt(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("learnt") is not False


def _spoken(messages: Messages, first: int, text: str, marked: list[Span] | None, template: ChatTemplate) -> list[Span]:
    """The spans of `text` in which the assistant speaks what is to be learnt, from message number `first` on."""
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    learnt = [index for index in turns if _is_learnt(messages[index])]
    if marked is not None:
        begin = _turn_start(messages, first, text, template) if first else 0
        spans = [(max(_said_from(start, text, template), begin), end) for start, end in marked if end > begin]
        if all(messages[index]["content"].strip() in "".join(text[s:e] for s, e in spans) for index in turns):
            return spans if len(learnt) == len(turns) else _of_turns(learnt, spans, messages, text, template)
        # Marks inside a macro are reported where the macro begins.
    return [_turn_or_difference(messages, index, text, template) for index in learnt]


def _said_from(start: int, text: str, template: ChatTemplate) -> int:
    """The start of a marked span, behind what the template itself says before each answer, if that is marked too."""
    opening, letter = template.opening, text[start : start + 1]
    for known in (place for place, own in enumerate(opening) if own == letter):
        if text.startswith(opening[known:], start) and text.endswith(opening[:known], 0, start):
            return start + len(opening) - known
    return start


def _of_turns(
    learnt: list[int], spans: list[Span], messages: Messages, text: str, template: ChatTemplate
) -> list[Span]:
    """Those of the marked spans that lie in the turns that are learnt; a template may mark several in one."""
    regions = [_turn_or_difference(messages, index, text, template) for index in learnt]
    return [(s, e) for s, e in spans if any(s < end and start < e for start, end in regions)]


def _turn_or_difference(messages: Messages, index: int, text: str, template: ChatTemplate) -> Span:
    """An assistant's turn; of one that is told otherwise at the end of a conversation what it says, and its end."""
    try:
        return _turn(messages, index, text, template)
    except _Untraceable:
        return _difference(messages, index, text, template)


def _turn(messages: Messages, index: int, text: str, template: ChatTemplate) -> Span:
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


def _turn_start(messages: Messages, index: int, text: str, template: ChatTemplate) -> int:
    """The place where the assistant begins to speak; a generation prompt may say more than the conversation has."""
    try:
        prompt, before = template.text(messages[:index], to_answer=True), template.text(messages[:index]).rstrip()
    except Exception:  # many take no conversation without a user's turn, and may raise anything
        raise _Untraceable(index + 1) from None
    start = _shared(prompt, text)
    if start < len(before):
        raise _Untraceable(index + 1)
    if start < len(prompt):  # what the prompt says more may begin as the answer does
        first = "reasoning_content" if "reasoning_content" in messages[index] else "content"
        marked = [*messages[:index], {**messages[index], first: SIGN}]
        head, found, _ = template.text(marked).partition(SIGN)
        if found and text.startswith(head):
            start = min(start, len(head))
    return start


def _closing(messages: Messages, text: str, content: str, template: ChatTemplate) -> str:
    """What the template prints behind the content of the last message."""
    _, found, closing = template.text([*messages[:-1], {**messages[-1], "content": SIGN}]).partition(SIGN)
    if not found or not text.endswith(content + closing):
        closing = text[text.rindex(content) + len(content) :]
    return closing


def _difference(messages: Messages, index: int, text: str, template: ChatTemplate) -> Span:
    """The part of the text that is another one where the turn says nothing but a sign, and the token that ends it."""
    plain = {part: value for part, value in messages[index].items() if part not in ("tool_calls", "reasoning_content")}
    try:
        other = template.text([*messages[:index], {**plain, "content": SIGN}, *messages[index + 1 :]])
    except Exception:  # as where answers of functions must follow a call
        raise _Untraceable(index + 1) from None
    start = _shared(other, text)
    rest = _shared(other[start:][::-1], text[start:][::-1])
    if other[start : len(other) - rest] != SIGN:  # something else in the conversation depends on what the turn says
        raise _Untraceable(index + 1)
    end = len(text) - rest
    return start, end + _ending(text[end:], template)


def _ending(after: str, template: ChatTemplate) -> int:
    """The characters of the token that ends a turn, if that follows next."""
    end = str(template.tokenizer.decode([template.turn_end])) if template.turn_end is not None else ""
    return after.index(end) + len(end) if after.lstrip().startswith(end) else 0


def _shared(one: str, other: str) -> int:
    """The number of characters that two texts begin with in common."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
