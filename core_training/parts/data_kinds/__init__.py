"""The kinds of data in records: a text, a conversation, a preference pair, a judged answer, a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core_training.parts.registry import Part, Registry, S
from core_training.parts.section import Section


@dataclass(frozen=True, kw_only=True)
class DataKind(Part[S]):
    """A kind of values (see `data_kinds.values`); `target` is the tuple of its `core_training.data.layout.Layout`s."""


TEXT = DataKind[Section](name="text", target="core_training.data.layouts.text:LAYOUTS")
CONVERSATION = DataKind[Section](name="conversation", target="core_training.data.layouts.conversation:LAYOUTS")
PREFERENCE = DataKind[Section](name="preference", target="core_training.data.layouts.preference:LAYOUTS")
FEEDBACK = DataKind[Section](name="feedback", target="core_training.data.layouts.feedback:LAYOUTS")
PROMPT = DataKind[Section](name="prompt", target="core_training.data.layouts.prompt:LAYOUTS")

DATA_KINDS: Registry[DataKind[Any]] = Registry(
    DataKind, "fedloom.data_kinds", [TEXT, CONVERSATION, PREFERENCE, FEEDBACK, PROMPT]
)
