"""What a recipe's tuning reaches of its model, asked of a process of its own: this one imports no heavy library."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from core_training.foundation.errors import InputError
from core_training.foundation.hub_models import find_model
from core_training.parts.tuning_modes.lora import LORA
from core_training.parts.tuning_modes.lora_xs import LORA_XS
from core_training.parts.tuning_modes.vera import VERA
from core_training.recipe.schema import Recipe

_WITHIN = 60.0
"""Seconds; most of the few that it takes are the libraries' imports."""
_LATER = "what adapters do not reach is told with its share when the run starts"


@dataclass(frozen=True)
class Outlook:
    """What is reached, in words and as `core_training.tuning.reach.Reach` has it; the latter where it is known."""

    words: str
    reach: list[dict[str, Any]] | None = None
    """Of each: `what` reaches, its `share`, the shares of what is `left_out` by parameters' names, a `hint`."""


def outlook_of(recipe: Recipe) -> Outlook | None:
    """The shares that adapters and four bits reach; None for a mode that has neither.

    Raises InputError where the recipe does not go together with its model.
    """
    if not {LORA.name, VERA.name, LORA_XS.name}.intersection(recipe.tuning_part.sections):
        return None
    if find_model(recipe.model.name_or_path) is None:
        return Outlook(f"{_LATER}: the model is not on this machine")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "core_training.models.outlook"],
            input=recipe.to_yaml(),
            capture_output=True,
            text=True,
            timeout=_WITHIN,
            check=False,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return Outlook(f"{_LATER}: the model's shapes were not known within {_WITHIN:g} s")
    except ValueError:
        said = done.stderr.strip().rpartition("\n")[2]
        return Outlook(f"{_LATER}: the model's shapes cannot be looked at ({said or f'exit code {done.returncode}'})")
    if "refused" in answer:
        raise InputError(answer["refused"])
    words = [reach.pop("said").partition(": ")[2] for reach in answer["reach"]]
    return Outlook(". ".join(words), answer["reach"])
