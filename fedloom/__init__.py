"""fedloom from Python. Importing it loads nothing heavy, and changes nothing in the process; see docs/python.md.

Everything here is imported when it is first asked for, so that parts of one's own can be added before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core_training import __version__ as __version__
    from core_training.foundation.errors import FedloomError as FedloomError
    from core_training.foundation.errors import InputError as InputError
    from core_training.parts.aggregation_rules import AGGREGATION_RULES as AGGREGATION_RULES
    from core_training.parts.codecs import CODECS as CODECS
    from core_training.parts.data_kinds import DATA_KINDS as DATA_KINDS
    from core_training.parts.mixing_rules import MIXING_RULES as MIXING_RULES
    from core_training.parts.outer_steps import OUTER_STEPS as OUTER_STEPS
    from core_training.parts.stages import STAGES as STAGES
    from core_training.parts.tuning_modes import TUNING_MODES as TUNING_MODES
    from core_training.recipe.reading import load_recipe as load_recipe
    from core_training.recipe.reading import parse_recipe as parse_recipe
    from core_training.recipe.schema import Recipe as Recipe
    from core_training.runs.run_folder import RunFolder as RunFolder
    from core_training.runs.run_folder import Summary as Summary
    from fedloom.python import evaluate as evaluate
    from fedloom.python import load_run as load_run
    from fedloom.python import simulate as simulate
    from fedloom.python import train as train

_PLACES = {
    "__version__": "core_training",
    "FedloomError": "core_training.foundation.errors",
    "InputError": "core_training.foundation.errors",
    "AGGREGATION_RULES": "core_training.parts.aggregation_rules",
    "CODECS": "core_training.parts.codecs",
    "DATA_KINDS": "core_training.parts.data_kinds",
    "MIXING_RULES": "core_training.parts.mixing_rules",
    "OUTER_STEPS": "core_training.parts.outer_steps",
    "STAGES": "core_training.parts.stages",
    "TUNING_MODES": "core_training.parts.tuning_modes",
    "load_recipe": "core_training.recipe.reading",
    "parse_recipe": "core_training.recipe.reading",
    "Recipe": "core_training.recipe.schema",
    "RunFolder": "core_training.runs.run_folder",
    "Summary": "core_training.runs.run_folder",
    "evaluate": "fedloom.python",
    "load_run": "fedloom.python",
    "simulate": "fedloom.python",
    "train": "fedloom.python",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fedloom' has no attribute '{name}'")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(_PLACES)
