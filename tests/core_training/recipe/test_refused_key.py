"""The key that others are told of an error which they may not read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from core_training.recipe.refused_key import refused_key
from core_training.recipe.schema import Recipe


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("training.max_length: none of the 40 records of /srv/ward/notes.jsonl fits; raise it", "training.max_length"),
        ("tuning.lora.target_modules: 'q' matches nothing", "tuning.lora.target_modules"),
        ("/srv/ward/notes.jsonl, line 41: stage sft needs messages", "data.train"),
        ("/srv/models/m: there is no tokenizer in it", "model.name_or_path"),
        ("data.Maria Huber: no such thing", None),
        ("training.secret: of the patient", None),
        ("the patient: it is nobody's", None),
    ],
)
def test_it_is_a_key_of_every_recipe_or_none(make_recipe: Callable[..., Recipe], text: str, key: str | None) -> None:
    recipe = make_recipe(data={"train": ["/srv/ward/notes.jsonl"]}, model={"name_or_path": "/srv/models/m"})
    assert refused_key(text, recipe) == key
