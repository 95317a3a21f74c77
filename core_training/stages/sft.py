"""Supervised fine-tuning on conversations: the assistant's tokens are learnt, everything else is context."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from jinja2 import TemplateError

from core_training.base_model import BaseModel
from core_training.errors import InputError
from core_training.records import Record
from core_training.stages.base import IGNORED, Example
from core_training.stages.causal_lm import build_trainer, evaluate

__all__ = ["build_trainer", "columns", "evaluate", "packs_by_default", "splits_long_texts", "tokenise"]

columns = (("messages",), ("prompt", "completion"))
packs_by_default = False
splits_long_texts = False


def tokenise(record: Record, values: dict[str, Any], base: BaseModel) -> Example:
    """The conversation under the model's chat template, with labels on the assistant's turns (and their end)."""
    messages = _messages(record, values)
    template = base.tokenizer.chat_template
    if not template:
        raise InputError(
            f"model.name_or_path: {base.folder} has no chat template; give one with model.chat_template: FILE.jinja"
        )
    try:
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):
            ids, learnt = _by_marks(messages, base.tokenizer)
        else:
            ids, learnt = _by_prefixes(messages, base.tokenizer)
    except TemplateError as error:
        raise InputError(f"{record.place}: the chat template does not take this conversation: {error}") from None
    return Example(ids, np.where(learnt, ids, IGNORED))


def _messages(record: Record, values: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in values:
        messages = values["messages"]
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good or not any(m["role"] == "assistant" for m in messages):
            raise InputError(
                f"{record.place}: 'messages' must be a list of {{role, content}} with an assistant's turn among them"
            )
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    for name, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{record.place}: the {name} is empty or not a string")
    return [{"role": "user", "content": values["prompt"]}, {"role": "assistant", "content": values["completion"]}]


def _by_marks(messages: list[dict[str, str]], tokenizer: Any) -> tuple[Any, Any]:
    """Tokens and assistant mask from a template whose `{% generation %}` marks say what the assistant speaks."""
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return np.asarray(encoded["input_ids"], dtype=np.int64), np.asarray(encoded["assistant_masks"], dtype=bool)


def _by_prefixes(messages: list[dict[str, str]], tokenizer: Any) -> tuple[Any, Any]:
    """Tokens and assistant mask for a template without generation marks: what each assistant turn adds."""

    def encode(part: list[dict[str, str]], prompt: bool) -> list[int]:
        encoded = tokenizer.apply_chat_template(part, tokenize=True, return_dict=True, add_generation_prompt=prompt)
        return list(encoded["input_ids"])

    ids = encode(messages, False)
    learnt = np.zeros(len(ids), dtype=bool)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            learnt[len(encode(messages[:index], True)) : len(encode(messages[: index + 1], False))] = True
    return np.asarray(ids, dtype=np.int64), learnt
