"""Judged answers: a conversation in any layout, with a mark on its last answer."""

from __future__ import annotations

from core_training.data.layout import Layout, Raw
from core_training.data.layouts import conversation
from core_training.data.turns import checked_prompt, without_last_answer
from core_training.parts.data_kinds.values import Conversation, JudgedAnswer, Messages


def _marked(raw: Raw, conversation: Messages) -> JudgedAnswer:
    """The conversation's last answer, with its mark."""
    label = raw["label"] if "label" in raw else raw["kto_tag"]
    if isinstance(label, str):
        label = {"true": True, "false": False}.get(label.strip().lower(), label)
    if not isinstance(label, bool):
        raise ValueError("the label must be true or false")
    prompt = without_last_answer(conversation)
    if prompt == conversation:
        raise ValueError("the conversation does not end with an assistant's turn, which the label is of")
    return JudgedAnswer(checked_prompt("prompt", prompt), conversation[len(prompt) :], label)


def _marked_layouts(layout: Layout[Conversation]) -> list[Layout[JudgedAnswer]]:
    """A conversation's layout with each name that the label may have."""

    def read(raw: Raw) -> JudgedAnswer:
        return _marked(raw, layout.read(raw).messages)

    return [Layout((*layout.required, name), read, layout.optional) for name in ("label", "kto_tag")]


LAYOUTS = tuple(marked for layout in conversation.LAYOUTS for marked in _marked_layouts(layout))
