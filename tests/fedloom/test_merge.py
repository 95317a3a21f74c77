"""`fedloom merge`: what it is told, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.models.combination import RULES
from fedloom.commands import merge as command
from tests.fedloom.conftest import Command

RecipeFile = Callable[..., Path]


def test_two_finished_runs_are_one_more_run_that_export_takes(
    fedloom: Command, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    recipe = recipe_file(training={"max_steps": 2})
    for name in ("a", "b"):
        assert fedloom("train", recipe, "--out", tmp_path / name, "--quiet").code == 0
    merged = fedloom("merge", tmp_path / "a", tmp_path / "b", "--to", tmp_path / "c", "--rule", "ties", "--json")
    assert merged.code == 0, merged.err
    said = json.loads(merged.out)
    assert (said["rule"], said["runs"]) == ("ties", 2)
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert said["state_digest"] == summary["state_digest"]
    assert fedloom("export", tmp_path / "c", "--to", tmp_path / "d", "--merge").code == 0
    again = fedloom("merge", tmp_path / "a", tmp_path / "b", "--to", tmp_path / "c")
    assert (again.code, "is not empty" in again.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weights", "1"], "--weights: 1 numbers for 2 runs"),
        (["--weights", "1,x"], "--weights: '1,x' is not a list of numbers"),
        (["--weights", "1,nan"], "--weights: each has to be a number above 0"),
        (["--density", "0.5"], "--density: rule task_arithmetic keeps all of a change"),
        (["--rule", "ties", "--density", "0"], "--density: 0 is no share"),
        (["--scale", "inf"], "--scale: give a number"),
    ],
)
def test_settings_that_do_not_fit_are_named(fedloom: Command, tmp_path: Path, options: list[str], said: str) -> None:
    outcome = fedloom("merge", tmp_path / "a", tmp_path / "b", "--to", tmp_path / "c", *options)
    assert outcome.code == 2
    assert said in outcome.err


def test_the_command_knows_every_rule() -> None:
    assert tuple(RULES) == command.RULES
