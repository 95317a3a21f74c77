"""Published chat templates, and conversations of every kind: what is learnt of each, and the table in the docs of it.

`make docs` makes the page with it; a test makes it again and compares.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from core_training.data.examples import IGNORED, Tokens
from core_training.data.folding import folded
from core_training.data.records import Record
from core_training.foundation.errors import InputError
from core_training.models.chat_template import ChatTemplate, named_template, template_names, training_template
from core_training.parts.data_kinds.values import Conversation, Messages
from core_training.stages.chat import conversation_tokens
from tests.tiny import tiny_tokenizer

_DOSE = {
    "type": "function",
    "function": {
        "name": "dose",
        "description": "The usual dose.",
        "parameters": {
            "type": "object",
            "properties": {"drug": {"type": "string", "description": "Its name."}},
            "required": ["drug"],
        },
    },
}
_ASKED = {"role": "user", "content": "Question one?"}
_SAID = {"role": "assistant", "content": "Answer one."}
_ASKED_AGAIN = {"role": "user", "content": "Question two?"}
_SAID_AGAIN = {"role": "assistant", "content": "Answer two."}
_CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "dose"}}]}
_CALL["tool_calls"][0]["function"]["arguments"] = {"drug": "aspirin"}  # type: ignore[index]
_RESULT = {"role": "tool", "name": "dose", "content": "100 mg"}

KINDS: dict[str, Conversation] = {
    "plain": Conversation([_ASKED, _SAID]),
    "two answers": Conversation([_ASKED, _SAID, _ASKED_AGAIN, _SAID_AGAIN]),
    "system": Conversation([{"role": "system", "content": "Be brief."}, _ASKED, _SAID, _ASKED_AGAIN, _SAID_AGAIN]),
    "tools": Conversation([_ASKED, _CALL, _RESULT, _SAID, _ASKED_AGAIN, _SAID_AGAIN], [_DOSE]),
    "thought": Conversation([_ASKED, {**_SAID, "reasoning_content": "Thought one."}]),
    "two thoughts": Conversation(
        [
            _ASKED,
            {**_SAID, "reasoning_content": "Thought one."},
            _ASKED_AGAIN,
            {**_SAID_AGAIN, "reasoning_content": "Thought two."},
        ]
    ),
    "begins with an answer": Conversation([_SAID, _ASKED, _SAID_AGAIN]),
    "answers in a row": Conversation([_ASKED, _SAID, _SAID_AGAIN]),
}

_SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜]+｜>|<start_of_turn>|<end_of_turn>|</?think>|<end_of_utterance>|</?tool_call>"
    r"|<\|?/?turn\|?>|<\|?channel\|?>"
)
"""What models with such templates have as tokens of their own."""

RECORD = Record({}, Path("talk.jsonl"), 1)


@dataclass(frozen=True)
class Reading:
    """A conversation as it is read under a template; `refusal` in the place of `tokens` where it is not."""

    text: str
    learnt: str
    tokens: Tokens | None
    changed: bool
    refusal: str = ""

    @property
    def cell(self) -> str:
        if self.tokens is None:
            return self.refusal
        return "learnt¹" if self.changed else "learnt"


@dataclass(frozen=True, eq=False)
class Published:
    """A published template on a tiny tokenizer that has its tokens."""

    name: str

    @cached_property
    def template(self) -> ChatTemplate:
        from transformers import AddedToken

        tokenizer = tiny_tokenizer()
        template = named_template(self.name)
        assert template is not None
        found = sorted(set(_SPECIAL.findall(template + training_template(template))))
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in found])
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.chat_template = template
        return ChatTemplate(tokenizer, date(2025, 1, 1))

    def read(self, kind: str) -> Reading:
        """A conversation of one kind under the template."""
        return self.read_values(KINDS[kind])

    def read_values(self, said: Conversation) -> Reading:
        told = folded(said, system=not self.template.takes_system, repeats=not self.template.takes_repeats)
        base: Any = SimpleNamespace(
            tokenizer=self.template.tokenizer, chat_template=self.template, folder=Path("model"), end_tokens=self.ends
        )
        try:
            tokens = conversation_tokens(told.messages, base, RECORD, told.tools)
        except InputError as error:
            return Reading("", "", None, changed=False, refusal=_short(str(error)))
        decode = self.template.tokenizer.decode
        learnt = str(decode(tokens.input_ids[tokens.labels != IGNORED]))
        return Reading(str(decode(tokens.input_ids)), learnt, tokens, changed=told is not said)

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end an answer, without what a model's configuration adds."""
        known = [self.template.tokenizer.eos_token_id, self.template.turn_end]
        return [token for token in known if token is not None]


def _short(error: str) -> str:
    """The reason of a refusal, for a cell of the table."""
    what = re.search(r"does not print (?:the )?(?:record's )?(all of )?(\w+)(?:.*of role (\w+))?", error)
    if what is None:
        return "refuses it" if "does not take this conversation" in error else "not found"
    return f"prints no {'turn of role ' + what[3] if what[3] else what[2].replace('_content', '')}"


def words(messages: Messages) -> list[str]:
    """What the assistant says, in the order in which templates print it."""
    said = []
    for message in messages:
        if message["role"] == "assistant":
            said += [one for one in (message.get("reasoning_content"), message["content"]) if one]
            said += ["aspirin"] * len(message.get("tool_calls", ()))
    return said


def page() -> str:
    """docs/templates.md."""
    lines = [
        "# Chat templates",
        "",
        "What is learnt under each published template, of conversations of every kind. `model.chat_template` takes the",
        "names in the first column, as it takes a Jinja file; a model's own template is recognised by its text. Where",
        "TRL has a variant of it for training, records are read with that one, and results keep the model's own.",
        "",
        "- **learnt**: the text holds all that the record says; exactly what the assistant says is labelled, its",
        "  thoughts and calls too, and nothing of anyone else.",
        "- **learnt¹**: the same, with the system text at the beginning of the user's words, or turns in a row as one:",
        "  the template takes no others, and how many records are changed so is said.",
        "- Anything else is why a record is refused, by its place: the template prints no thoughts (then",
        "  `data.reasoning: last` or `drop` leaves them out), no tools, or raises an error of its own.",
        "",
        "| template | closes a turn with | " + " | ".join(KINDS) + " |",
        "|---|---|" + "---|" * len(KINDS),
    ]
    for name in template_names():
        published = Published(name)
        end = published.template.turn_end
        closes = f"`{published.template.tokenizer.decode([end])}`" if end is not None else "nothing of its own²"
        cells = [published.read(kind).cell for kind in KINDS]
        lines.append(f"| {name} | {closes.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "² Its own words end a turn, or the next turn's beginning does. How many records teach no end is said; give",
        "  a template that closes the assistant's turn with `{{ eos_token }}`.",
        "",
        "This page is made by `make docs`; a test compares it.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
