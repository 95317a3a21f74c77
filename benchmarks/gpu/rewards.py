"""A reward that needs no model: what sampled answers are judged by here, at ours and at TRL's."""

from __future__ import annotations

from typing import Any


def many_letters(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """The number of different characters in each answer, whether it is a text or messages."""
    return [float(len(set(str(completion)))) for completion in completions]
