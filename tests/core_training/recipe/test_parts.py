"""The tables of parts: what a part cannot be called, and when it comes too late."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from core_training.foundation.errors import InputError
from core_training.parts.aggregation_rules import AGGREGATION_RULES, FEDAVG
from core_training.parts.codecs import BF16, CODECS
from core_training.parts.mixing_rules import GROUP, MIXING_RULES
from core_training.parts.outer_steps import NONE, OUTER_STEPS
from core_training.parts.registry import Part, Registry
from core_training.parts.stages import STAGES
from core_training.parts.stages.dpo import DPO
from core_training.parts.tuning_modes import TUNING_MODES
from core_training.parts.tuning_modes.lora import LORA
from core_training.recipe.schema import Recipe
from core_training.recipe.sections.aggregation import Aggregation, Outer
from core_training.recipe.sections.privacy import Privacy
from core_training.recipe.sections.tuning import Tuning

TABLES: list[tuple[Registry[Any], type[Any], Part[Any]]] = [
    (STAGES, Recipe, DPO),
    (TUNING_MODES, Tuning, LORA),
    (AGGREGATION_RULES, Aggregation, FEDAVG),
    (MIXING_RULES, Aggregation, GROUP),
    (OUTER_STEPS, Outer, NONE),
    (CODECS, Privacy, BF16),
]


@pytest.mark.parametrize(("table", "section", "part"), TABLES, ids=lambda one: getattr(one, "__name__", ""))
def test_a_part_takes_the_place_of_no_key_or_property_of_its_section(
    table: Registry[Any], section: type[Any], part: Part[Any]
) -> None:
    names = {name for name in (*section.model_fields, *dir(section)) if not name.startswith("_")}
    if table is MIXING_RULES:  # a name of both tables is told when a recipe is read: the later one may be a package's
        names -= AGGREGATION_RULES.keys()
    free = [name for name in sorted(names) if table._fault(replace(part, name=name), table) is None]
    assert free == []


@pytest.mark.parametrize("name", ["", "Mine", "my-own", "1st", "my own", "_mine", "mine\n"])
def test_a_name_is_one_that_a_recipe_can_hold(name: str) -> None:
    assert "cannot be called" in str(STAGES._fault(replace(DPO, name=name), STAGES))


def test_a_part_that_comes_after_recipes_is_refused() -> None:
    with pytest.raises(InputError, match="part 'mine': recipes are in use already"):
        STAGES.add(replace(DPO, name="mine"))
