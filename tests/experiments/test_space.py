"""The keys that a search varies: ranges, conditions, grids, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from core_training.foundation.errors import InputError
from experiments.search.space import grid_of, parse_keys, probes, suggested

CONDITIONAL = {
    "training.lr_scheduler_type": ["constant", "cosine"],
    "training.warmup_ratio": {"low": 0, "high": 0.2, "step": 0.1, "when": {"training.lr_scheduler_type": "cosine"}},
    "tuning.lora.r": {"low": 2, "high": 6, "step": 2},
}


def test_a_grid_has_each_combination_once_and_keys_only_where_they_apply() -> None:
    grid = grid_of(parse_keys(CONDITIONAL))
    assert len(grid) == 3 + 3 * 3  # constant has no warm-up to vary
    assert grid[0] == {"training.lr_scheduler_type": "constant", "tuning.lora.r": 2}
    assert {row["tuning.lora.r"] for row in grid} == {2, 4, 6}
    assert sorted({row.get("training.warmup_ratio", -1) for row in grid}) == [-1, 0.0, 0.1, 0.2]


def test_whole_numbers_are_an_int_unless_the_recipe_takes_fractions() -> None:
    kinds = {key.name: key.kind for key in parse_keys({
        "tuning.lora.r": {"low": 2, "high": 8},
        "training.learning_rate": {"low": 0, "high": 1},
        "training.warmup_ratio": {"low": 0, "high": 0.5},
        "training.max_steps": {"low": 2, "high": 8, "type": "int"},
    })}  # fmt: skip
    assert list(kinds.values()) == ["int", "float", "float", "int"]


def test_every_end_and_choice_is_probed_beside_values_at_which_it_applies() -> None:
    keys = parse_keys(CONDITIONAL)
    tried = list(probes(keys))
    assert [name for name, _ in tried] == [key.name for key in keys for _ in range(2)]
    assert all(name in values for name, values in tried)


def test_values_of_keys_that_do_not_apply_are_not_asked_for() -> None:
    keys = parse_keys(CONDITIONAL)
    asked = suggested(keys, lambda key: key.extremes[0])
    assert "training.warmup_ratio" not in asked


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"low": 2, "high": 1}, "low (2) is above high (1); swap them"),
        ({"low": 1, "high": 1}, "there is nothing to search"),
        ({"low": 0, "high": 1, "log": True}, "begins above 0, and low is 0"),
        ({"low": 1}, "high: give a number (or choices in place of low and high); it is missing"),
        ({"low": "a", "high": 1}, "low: give a number"),
        ({"low": 1, "high": 9, "step": 0}, "step: give a number above 0"),
        ({"low": 1, "high": 9, "step": 1, "log": True}, "log and step do not go together"),
        ({"low": 1.5, "high": 9, "type": "int"}, "an int has whole numbers"),
        ({"low": 1, "high": 9, "type": "whole"}, "it is float or int, not 'whole'"),
        ({"low": 1, "high": 9, "hihg": 3}, "did you mean 'high'?"),
        ([], "choices: give a list of at least one value"),
        ([1, 1], "a value is there twice"),
        ({"choices": [1], "low": 1}, "low: choices have none"),
        (7, "give low and high, or a list of choices, not 7"),
        ({"low": 1, "high": 2, "when": {"b": 1}}, "'b' is no key of the search before this one"),
    ],
)
def test_a_range_that_is_none_is_refused(given: Any, said: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_keys({"a": given})
    assert "keys.a" in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize(("value", "said"), [("x", "none of its choices (u, v)"), ([], "at least one value")])
def test_a_condition_on_a_value_that_cannot_be_is_refused(value: Any, said: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_keys({"a": ["u", "v"], "b": {"low": 1, "high": 2, "when": {"a": value}}})
    assert said in str(refused.value)


def test_a_grid_of_a_range_without_steps_is_refused() -> None:
    with pytest.raises(InputError, match="a grid needs its values"):
        grid_of(parse_keys({"training.learning_rate": {"low": 0.1, "high": 0.2}}))
