"""A recipe's place on this machine: `-` for standard input, and `~` in its paths.

Knows which of a recipe's keys may hold a path, and nothing else of what they mean.
"""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Any

STANDARD_INPUT = Path("-")
"""In the place of a recipe file: the recipe comes from standard input."""

PATHS = {
    "model": ("name_or_path", "chat_template", "adapters"),
    "rollout": ("reward_model", "reward_function"),
    "data": ("train", "eval", "cache"),
    "deepspeed": ("config",),
    "simulation": ("sites",),
}
"""The keys of each section that may hold paths, besides `output`."""


def expand_home(document: dict[str, Any]) -> None:
    """Put the home folder in the place of `~` and `~user` where a path begins with them; the user must be known."""
    for section, keys in PATHS.items():
        values = document.get(section)
        if isinstance(values, dict):
            values |= {key: _expanded(values[key]) for key in keys if key in values}
    if "output" in document:
        document["output"] = _expanded(document["output"])


def _expanded(value: Any) -> Any:
    """A path, a list of them, or a mapping that has them as its keys (functions' weights) or values (sites' files)."""
    if isinstance(value, str):
        return os.path.expanduser(value)
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    if isinstance(value, dict):
        return {_expanded(key): _expanded(one) for key, one in value.items()}
    return value
