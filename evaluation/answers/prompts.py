"""From items to the tokens that a model reads: prompts under its chat template or plain, and choices behind them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import cast

import numpy as np

from core_training.data.folding import folded
from core_training.foundation.errors import InputError
from core_training.models.endings import opening_tokens
from core_training.parts.data_kinds.values import Messages, Prompt
from core_training.stages.chat import prompt_tokens
from evaluation.answers.subjects import Subject
from evaluation.items import Item, Task


@dataclass(frozen=True)
class Continued:
    """Continuations of one prompt: each whole sequence of tokens, and the place where the continuations begin."""

    id: str
    wholes: tuple[tuple[int, ...], ...]
    start: int

    @property
    def shared(self) -> int:
        """The tokens that all begin with, and at least one less than any has; at most the prompt's."""
        first = self.wholes[0]
        same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*self.wholes, strict=False)))
        return min(same, self.start, len(first) - 1, *(len(whole) - 1 for whole in self.wholes))


def uses_chat(task: Task, item: Item, subject: Subject) -> bool:
    """Whether an item goes through the chat template. Raises InputError where it must and the model has none."""
    if task.chat is False and item.plain:
        return False
    if subject.has_template:
        return bool(item.prompt) and not item.is_text
    if task.chat or not item.plain:
        raise InputError(
            f"{item.place}: it is a conversation, and {subject.name} has no chat template; evaluate a model that has "
            "one, or a task of plain texts"
        )
    return False


def turns_of(item: Item, subject: Subject) -> Messages:
    """The turns of a prompt as the chat template takes them, folded as they are for training."""
    values, template = Prompt(item.prompt), subject.base.chat_template
    if folded(values, system=True, repeats=True) is values:
        return item.prompt
    return folded(values, system=not template.takes_system, repeats=not template.takes_repeats).prompt


def opening(task: Task, item: Item, subject: Subject) -> list[int]:
    """The tokens of an item's prompt, up to where an answer begins."""
    if uses_chat(task, item, subject):
        ids = prompt_tokens(turns_of(item, subject), subject.base, item.record, item.tools).input_ids.tolist()
    else:
        ids = opening_tokens(item.plain, subject.tokenizer)
    subject.base.check_tokens(np.array(ids, dtype=np.int64), item.place)
    return cast(list[int], ids)


def continued(task: Task, item: Item, continuations: tuple[str, ...], subject: Subject) -> Continued:
    """The item's prompt with each continuation behind it.

    Prompt and continuation become tokens together, as a model would write them: a token may reach over the border only
    where the tokenizer says so, and the continuation is what follows the prompt's own number of tokens.
    """
    if uses_chat(task, item, subject):
        turns = turns_of(item, subject)
        prompt_tokens(turns, subject.base, item.record, item.tools)  # what is wrong with it is said
        text = subject.base.chat_template.with_tools(item.tools).text(turns, to_answer=True)
        ids = [_encoded(text + one, subject) for one in continuations]
        start = len(_encoded(text, subject))
    else:
        text = item.plain
        ids = [opening_tokens(text + item.delimiter + one, subject.tokenizer) for one in continuations]
        start = len(opening_tokens(text.rstrip(), subject.tokenizer))
    if not start:  # an empty prompt: something must stand before the first token
        first = subject.tokenizer.bos_token_id
        first = subject.tokenizer.eos_token_id if first is None else first
        ids, start = [[cast(int, first), *one] for one in ids], 1
    for one, whole in zip(continuations, ids, strict=True):
        if len(whole) <= start:
            raise InputError(f"{item.place}: the choice {one!r} adds no token to the prompt; give it words")
        subject.base.check_tokens(np.array(whole, dtype=np.int64), item.place)
    return _within(Continued(item.id, tuple(map(tuple, ids)), start), subject.context, item)


def _within(whole: Continued, most: int, item: Item) -> Continued:
    """The sequences without the beginning that a model has no room for."""
    longest = max(map(len, whole.wholes))
    if longest <= most:
        return whole
    lost = longest - most
    if lost >= whole.start:
        raise InputError(f"{item.place}: a choice alone has more tokens than the model looks at ({most})")
    return Continued(whole.id, tuple(one[lost:] for one in whole.wholes), whole.start - lost)


def _encoded(text: str, subject: Subject) -> list[int]:
    return list(subject.tokenizer.encode(text, add_special_tokens=False))
