"""The peak learning rate of a recipe that gives none: by stage and mode, the model's width and the number of sites."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from core_training.foundation.state import Manifest
from core_training.models.base_model import BaseModel
from core_training.recipe.learning_rate import (
    USUAL_WIDTH,
    learning_rate_of,
    most_learning_rate,
    share_of_most,
    width_of,
    with_sites,
)
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from strategies.ring_scale import first_scale, largest_change

MakeRecipe = Callable[..., Recipe]


def recipe_of(*overrides: str, kind: str = "federated") -> Recipe:
    text = f"model: {{name_or_path: base}}\nstage: sft\ntopology: {{kind: {kind}, rounds: 4}}\n"
    return parse_recipe(text, overrides=list(overrides))


def test_what_a_recipe_gives_is_what_it_gets() -> None:
    recipe = recipe_of("training.learning_rate=1e-3", "topology.sites=9")
    assert [learning_rate_of(recipe, width) for width in (None, 256, 8192)] == [1e-3] * 3
    assert (most_learning_rate(recipe), share_of_most(recipe, 8192)) == (1e-3, 1.0)


def test_the_rate_goes_with_one_over_the_width_between_those_that_were_tried() -> None:
    recipe = recipe_of(kind="central")
    rates = {width: learning_rate_of(recipe, width) for width in (16, 256, 1024, USUAL_WIDTH, 8192, 10**6)}
    assert rates == pytest.approx({16: 3.2e-3, 256: 3.2e-3, 1024: 8e-4, USUAL_WIDTH: 2e-4, 8192: 1e-4, 10**6: 5e-5})
    assert learning_rate_of(recipe, None) == 2e-4


def test_the_rate_grows_with_the_root_of_the_number_of_sites_and_not_in_a_central_run() -> None:
    for sites in (1, 3, 20):
        assert learning_rate_of(recipe_of(f"topology.sites={sites}"), None) == pytest.approx(2e-4 * math.sqrt(sites))
        assert learning_rate_of(recipe_of(f"topology.sites={sites}", kind="central"), None) == 2e-4
    assert learning_rate_of(recipe_of(), None) == 2e-4, "one site is a central run"


@pytest.mark.parametrize("mode", ["lora", "full", "freeze", "qlora"])
def test_the_width_is_the_models_hidden_size_in_every_mode(make_recipe: MakeRecipe, mode: str) -> None:
    base = BaseModel(make_recipe(tuning={"mode": mode}))
    assert width_of(base.manifest) == base.model.config.hidden_size


def test_layers_that_hold_their_weights_the_other_way_round_have_a_width_too() -> None:
    gpt2 = {"c_attn": (96, 288), "attn.c_proj": (96, 96), "c_fc": (96, 384), "mlp.c_proj": (384, 96), "norm": (96,)}
    assert width_of(Manifest.of(gpt2)) == 96


def test_where_no_matrix_is_trained_the_rate_is_the_usual_one() -> None:
    assert width_of(Manifest.of({"ia3_l": (96,)})) is None


def test_a_ring_allows_what_the_narrowest_model_can_do_and_begins_with_what_this_one_can() -> None:
    recipe = recipe_of("topology.sites=4", "privacy.codec=ring16")
    wide = Manifest.of({"w": (8, 4096)})
    given = recipe_of("training.learning_rate=4e-4", "privacy.codec=ring16")
    assert learning_rate_of(recipe, width_of(wide)) == learning_rate_of(given, width_of(wide))
    assert largest_change(recipe) == 16 * largest_change(given)
    limits = [
        math.ldexp(largest_change(one), -first_scale(one, wide).exponents[0]) for one in (recipe, given)
    ]  # fmt: skip
    assert limits[0] == limits[1]


def test_the_number_of_sites_is_written_down_only_where_a_rate_goes_with_it() -> None:
    assert with_sites(recipe_of(), 6).topology.sites == 6
    assert with_sites(recipe_of("topology.sites=3"), 6).topology.sites == 3
    given = recipe_of("training.learning_rate=1e-3")
    assert with_sites(given, 6) is given
