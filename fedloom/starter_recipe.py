"""Recipes to start from: for each stage, tuning mode and topology the keys that one usually sets, with what they mean.

Values and meanings are the schema's own, so they cannot differ from what is checked.
"""

from __future__ import annotations

import json
from textwrap import wrap
from typing import Any

from core_training.data.formats import column_sets
from core_training.parts.section import Section
from core_training.parts.stages import STAGES
from core_training.parts.tuning_modes import TUNING_MODES
from core_training.recipe.learning_rate import USUAL_WIDTH
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from core_training.recipe.sections.tuning import Tuning

_ROLLOUT_KEYS = ("reward_model", "max_new_tokens", "temperature")
"""The keys of section `rollout` one usually sets."""


def starter_recipe(stage: str, tuning: str, topology: str) -> str:
    """A recipe that is valid as it stands; its paths are to be filled in."""
    lines = [
        "model:",
        "  name_or_path: path/to/base-model",
        "  # adapters: [runs/earlier]  # start from what earlier runs trained",
        f"stage: {stage}",
        "tuning:",
        f"  mode: {tuning}",
    ]
    for name in TUNING_MODES[tuning].sections:
        lines += _section(Tuning, name, TUNING_MODES[name].usual_keys, indent="  ")
    if STAGES[stage].samples:
        lines += _section(Recipe, "rollout", _ROLLOUT_KEYS, reward_model="runs/reward")
        lines.append("  # reward_function: FILE.py:name  # instead of it, a Python function; see docs/stages.md")
    if STAGES[stage].settings is not None:
        lines += _section(Recipe, stage, STAGES[stage].usual_keys)
    lines += [
        "data:",
        "  train: data/*.jsonl.gz  # in a real federation: the data set's name, which each site maps to its own files",
        *_columns(stage),
        "  eval_fraction: 0.1",
        "training:",
        "  per_device_train_batch_size: 8",
        "  max_length: 512",
        "  seed: 0",
    ]
    usual = parse_recipe("\n".join(lines), source="recipe new").usual_learning_rate
    lines += [
        f"  # learning_rate: {usual:g}  # usual for {stage} with {tuning} at a width of {USUAL_WIDTH:,}; where this is",
        "  #   left out, it is fitted to the model's width and the number of sites (fedloom recipe check says it)",
        "topology:",
        f"  kind: {topology}",
        "  rounds: 40",
        "  local_steps: 5  # few steps between exchanges keep sites together; a central run has rounds × local_steps",
        "simulation:  # the sites of fedloom simulate",
        "  sites: [data/hospital-a.jsonl.gz, data/hospital-b.jsonl.gz]",
        f"output: runs/{stage}-{tuning}-{topology}",
    ]
    return "\n".join(lines) + "\n"


def _section(owner: type[Section], name: str, keys: tuple[str, ...], indent: str = "", **values: str) -> list[str]:
    """A section with these keys (none: all of them), their defaults (or `values`) and meanings."""
    section: Any = owner.model_fields[name].annotation
    lines = [f"{indent}{name}:"]
    for key in keys or section.model_fields:
        value = values.get(key, section.model_fields[key].default)
        shown = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"{indent}  {key}: {shown}  # {section.model_fields[key].description}")
    return lines


def _columns(stage: str) -> list[str]:
    """The stage's columns, and the way to name others."""
    sets = column_sets(stage)
    reads = "columns read: " + ", or ".join("+".join(columns) for columns in sets)
    renaming = f"columns: {{{sets[0][0]}: name_in_the_files}}  # where a column is called otherwise"
    return [f"  # {line}" for line in [*wrap(reads, width=100), renaming]]
