"""Conversations to tokens under a model's chat template, with labels on what the assistant says.

The template gives text, and labels are decided on that text: by the template's own `{% generation %}` marks, or, where
it has none, by what each of the assistant's turns adds to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jinja2 import TemplateError

from core_training.data.examples import IGNORED, Tokens
from core_training.data.records import Record
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]
Span = tuple[int, int]
"""Characters of a text: from the first to before the second."""


def conversation_tokens(messages: Messages, base: BaseModel, record: Record) -> Tokens:
    """A conversation, with labels on each of the assistant's turns and the tokens that end it."""
    return answer_tokens([], messages, base, record)


def answer_tokens(prompt: Messages, answer: Messages, base: BaseModel, record: Record) -> Tokens:
    """A prompt and an answer to it, with labels on the assistant's turns of the answer alone."""
    messages, tokenizer = [*prompt, *answer], base.tokenizer
    if not tokenizer.is_fast:
        raise InputError(
            f"model.name_or_path: {base.folder}: its tokenizer does not say which characters a token is of, so what "
            "the assistant says cannot be found; save a fast one (tokenizer.json) beside the weights"
        )
    with _template_errors(base, record):
        text = _text(messages, tokenizer)
        spans = _spoken(messages, len(prompt), text, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    first, last = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    spoken = np.zeros(len(ids), dtype=bool)
    for start, end in spans:  # a token that reaches over the start of a span is learnt with it
        spoken |= (first < end) & ((last > start) | (first >= start))
    return Tokens(ids, np.where(spoken, ids, IGNORED))


def prompt_tokens(prompt: Messages, base: BaseModel, record: Record) -> Tokens:
    """A prompt up to where the assistant is to speak; no labels."""
    with _template_errors(base, record):
        text = _text(prompt, base.tokenizer, to_answer=True)
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
    refused = (
        f"{record.place}: the chat template (that of {base.folder}, or model.chat_template) does not take this "
        "conversation"
    )
    try:
        yield
    except TemplateError as error:
        raise InputError(f"{refused}: {error}") from None
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


def _spoken(messages: Messages, first: int, text: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The spans of `text` in which the assistant speaks, in the messages from number `first` on."""
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        begin = _turn_start(messages, first, text, tokenizer) if first else 0
        return [(max(start, begin), end) for start, end in _marked(messages, tokenizer) if end > begin]
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    return [_turn(messages, index, text, tokenizer) for index in turns]


def _turn(messages: Messages, index: int, text: str, tokenizer: PreTrainedTokenizerBase) -> Span:
    """The span that an assistant's turn adds to the text before it."""
    start = _turn_start(messages, index, text, tokenizer)
    ending_here = _text(messages[: index + 1], tokenizer)
    if text.startswith(ending_here):
        return start, len(ending_here)
    # Some templates tell the last turn at more length than those before it: its content, then, and what closes it.
    content = messages[index]["content"].strip()
    end = start + len(content)
    if not text.startswith(content, start) or content not in ending_here:
        raise _Untraceable(index + 1)
    closing = ending_here[ending_here.rindex(content) + len(content) :]
    shared = _shared(closing, text[end:])  # which may end inside a token
    pieces = tokenizer(closing, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return start, end + max((stop for _, stop in pieces if stop <= shared), default=0)


def _turn_start(messages: Messages, index: int, text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The place where the assistant begins to speak; a generation prompt may say more than the conversation has."""
    start = _shared(_text(messages[:index], tokenizer, to_answer=True), text)
    if start < len(_text(messages[:index], tokenizer).rstrip()):
        raise _Untraceable(index + 1)
    return start


def _marked(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The spans that the template marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[list(messages)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **cast(dict[str, Any], tokenizer.special_tokens_map),
    )
    _, (spans,) = rendered
    return [(start, end) for start, end in spans]


def _shared(one: str, other: str) -> int:
    """The number of characters that two texts begin with in common."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def _text(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, to_answer: bool = False) -> str:
    return cast(str, tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=to_answer))
