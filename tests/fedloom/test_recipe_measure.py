"""`fedloom recipe check --measure`: what a run will take, from a few of its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.families.building import make_family
from tests.fedloom.conftest import Command

RecipeFile = Callable[..., Path]


def test_a_few_steps_say_what_all_will_take(fedloom: Command, recipe_file: RecipeFile, tmp_path: Path) -> None:
    path = recipe_file(training={"max_steps": 40})
    outcome = fedloom("recipe", "check", path, "--measure", "--json")
    assert outcome.code == 0, outcome.err
    measured = json.loads(outcome.out)["measured"]
    assert measured["steps"] == 40
    assert measured["sites"] == 1
    assert measured["seconds"] == measured["seconds_per_step"] * 40
    assert measured["tokens_per_second"] > 0
    assert measured["peak_bytes"] > 2**26
    assert measured["train_examples"] > measured["eval_examples"] > 0
    assert not (tmp_path / "run").exists()
    outcome = fedloom("recipe", "check", path, "--measure")
    assert "40 steps in about " in outcome.out


def test_the_steps_of_all_sites_of_a_simulation_count(
    fedloom: Command, recipe_file: RecipeFile, site_files: list[Path]
) -> None:
    topology = {"kind": "federated", "rounds": 3, "local_steps": 2}
    path = recipe_file(topology=topology, simulation={"sites": [str(file) for file in site_files[:2]]})
    outcome = fedloom("recipe", "check", path, "--measure")
    assert "6 steps at each of 2 sites in about " in outcome.out


def test_rounds_at_a_sites_own_pace_are_measured_by_records_and_by_time(
    fedloom: Command, recipe_file: RecipeFile, site_files: list[Path]
) -> None:
    sites = {"sites": [str(file) for file in site_files[:2]]}

    def measured(**pace: float) -> dict[str, Any]:
        path = recipe_file(topology={"kind": "federated", "rounds": 3, **pace}, simulation=sites)
        outcome = fedloom("recipe", "check", path, "--measure", "--json")
        assert outcome.code == 0, outcome.err
        result: dict[str, Any] = json.loads(outcome.out)["measured"]
        return result

    by_passes = measured(local_epochs=1.0)
    batches = -(-by_passes["train_examples"] // 4)
    assert (by_passes["steps"], by_passes["sites"]) == (3 * batches, 1)
    by_time = measured(local_seconds=2.0)
    assert by_time["sites"] == 2
    assert 12 <= by_time["seconds"] <= 12 + 6 * by_time["seconds_per_step"]


def test_a_model_that_cannot_be_trained_is_refused(
    fedloom: Command, recipe_file: RecipeFile, tiny_model: Path, tmp_path: Path
) -> None:
    folder = make_family("gemma4_assistant", tiny_model, tmp_path / "assistant")
    outcome = fedloom("recipe", "check", recipe_file(model={"name_or_path": str(folder)}), "--measure")
    assert outcome.code == 2
    assert "a Gemma4AssistantForCausalLM reads something else than tokens: " in outcome.err
    assert "Traceback" not in outcome.err


def test_a_group_is_not_measured_in_one_process(fedloom: Command, recipe_file: RecipeFile) -> None:
    outcome = fedloom("recipe", "check", recipe_file(deepspeed={"processes": 2}), "--measure")
    assert outcome.code == 2
    assert "--measure: " in outcome.err
