"""What `recipe check` warns of: settings under which several sites are known to learn little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core_training.recipe.schema import Recipe
from fedloom.recipe_account import account_of, warnings_of
from tests import tiny

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"topology": {"local_steps": 30}}, "topology.local_steps: in 30 steps between two exchanges the sites drift"),
        ({"aggregation": {"outer": {"step": "nesterov", "momentum": 0.9}}}, "0.9 wants hundreds of rounds"),
        ({"topology": {"local_steps": None, "local_seconds": 2.0}}, "so no second run gives the same"),
        (
            {"aggregation": {"outer": {"step": "fedexp"}}, "training": {"learning_rate": None}},
            "training.learning_rate: unset it goes with the number of sites, and fedexp goes further by itself",
        ),
        ({"aggregation": {"outer": {"step": "adam"}}}, "aggregation.outer.learning_rate: adam moves each value"),
    ],
)
def test_what_stalls_is_said(make_recipe: MakeRecipe, sections: dict[str, Any], said: str) -> None:
    topology = {"kind": "federated", "rounds": 6, "local_steps": 5, **sections.pop("topology", {})}
    (warning,) = warnings_of(make_recipe(topology=topology, **sections))
    assert said in warning


def test_nothing_is_said_of_the_defaults_or_of_central_training(make_recipe: MakeRecipe) -> None:
    assert warnings_of(make_recipe(topology={"kind": "federated", "rounds": 6})) == []
    assert warnings_of(make_recipe(topology={"kind": "central", "rounds": 6, "local_steps": 30})) == []


def test_how_far_a_site_goes_is_said_as_the_recipe_says_it(make_recipe: MakeRecipe) -> None:
    def steps(**pace: float) -> str:
        return account_of(make_recipe(topology={"kind": "federated", "rounds": 6, **pace}))["steps"]

    assert "6 rounds, each of 0.5 passes over a site's own records, in steps of adamw" in steps(local_epochs=0.5)
    assert "6 rounds, each of 2 s at each site, in steps of adamw" in steps(local_seconds=2.0)
    assert "30 steps at each site, in 6 rounds of 5 of adamw" in steps()


@pytest.mark.parametrize("many", [200, 20])
def test_one_site_with_nearly_all_records_is_named(make_recipe: MakeRecipe, tmp_path: Path, many: int) -> None:
    """But not where it takes steps in proportion."""
    large = tiny.write_jsonl(tmp_path / "large.jsonl", tiny.questions(0, many))
    small = tiny.write_jsonl(tmp_path / "small.jsonl", tiny.questions(1, 6))
    sites = {"large": str(large), "small": str(small)}
    warnings = warnings_of(make_recipe(topology={"kind": "federated", "rounds": 6}, simulation={"sites": sites}))
    assert [f"{large} holds 97% of all records" in warning for warning in warnings] == [True] * (many == 200)
    by_passes = {"kind": "federated", "rounds": 6, "local_epochs": 1.0}
    assert warnings_of(make_recipe(topology=by_passes, simulation={"sites": sites})) == []


@pytest.mark.parametrize(
    ("sites", "privacy", "said"),
    [
        (8, {}, "3 poisoned of 8 sites in 8 groups of one or more"),
        (12, {"secure_aggregation": True}, "1 poisoned of 12 sites in 4 groups of 3 or more"),
        (None, {}, "1 poisoned of 3 sites in 3 groups, 2 poisoned of 5 sites in 5 groups, 3 poisoned of 8 sites in 8"),
        (None, {"secure_aggregation": True}, "1 poisoned of 9 sites in 3 groups, 2 poisoned of 15 sites in 5 groups"),
    ],
)
def test_what_a_gate_of_groups_bears_is_said(
    make_recipe: MakeRecipe, sites: int | None, privacy: dict[str, Any], said: str
) -> None:
    topology = {"kind": "federated", "rounds": 6, "sites": sites}
    recipe = make_recipe(topology=topology, aggregation={"rule": "group_gate"}, privacy=privacy)
    assert said in account_of(recipe)["bears"]
    assert "bears" not in account_of(make_recipe(topology=topology, privacy=privacy))


@pytest.mark.parametrize(
    ("adapters", "said"),
    [("both", "this is what travels"), ("ffa", "only B trains and travels"), ("fedsa", "only A travels")],
)
def test_what_travels_of_an_adapter_is_said(make_recipe: MakeRecipe, adapters: str, said: str) -> None:
    recipe = make_recipe(topology={"kind": "federated", "rounds": 6}, aggregation={"adapters": adapters})
    assert said in account_of(recipe)["trains"]
