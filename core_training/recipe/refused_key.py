"""The recipe's key that an error is about, for those who may not read the error: it speaks of files and records."""

from __future__ import annotations

import re

from core_training.recipe.key_types import type_of
from core_training.recipe.schema import Recipe

_LEADING = re.compile(r"[a-z_]+(\.[a-z_]+)*(?=: )")


def refused_key(text: str, recipe: Recipe) -> str | None:
    """The key that the text of an InputError begins with, or whose value, a path of this machine, it names.

    None where it does neither. What is returned is one of the keys that every recipe has.
    """
    leading = _LEADING.match(text)
    if leading is not None and type_of(leading[0]) is not None:
        return leading[0]
    data = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
    for key, value in {**data, "model.name_or_path": recipe.model.name_or_path}.items():
        if any(path in text for path in ([value] if isinstance(value, str) else value or [])):
            return key
    return None
