"""Finished runs put together without training: the rules against NumPy, and a result that others take as a run's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from core_training.engine.central import train
from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.foundation.state import Manifest, TrainableState
from core_training.models.combination import RULES, Merge, combined, merge_runs
from core_training.models.results import export_model, find_result, load_result
from core_training.recipe.schema import Recipe
from core_training.runs.result_format import read_result
from core_training.runs.run_folder import RunFolder

MakeRecipe = Callable[..., Recipe]
Array = npt.NDArray[np.float32]

MANIFEST = Manifest.of({"a": (40, 5), "b": (30,)})


def _states(count: int) -> list[TrainableState]:
    rng = np.random.default_rng(3)
    return [TrainableState(MANIFEST, rng.standard_normal(230).astype(np.float32)) for _ in range(count)]


def _ties(changes: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    """Yadav et al. (2023), algorithm 1: trim, elect a sign, mean of those of that sign."""
    trimmed = []
    for change in changes:
        kept = np.zeros_like(change)
        largest = np.argsort(-np.abs(change), axis=None, kind="stable")[: int(density * change.size)]
        kept.flat[largest] = change.flat[largest]
        trimmed.append(kept)
    weighed = np.stack([weight * change for weight, change in zip(weights, trimmed, strict=True)])
    agrees = np.sign(weighed) == np.where(weighed.sum(axis=0) >= 0, 1, -1)
    return (weighed * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties"])
def test_a_rule_is_what_was_published(rule: str) -> None:
    start, *states = _states(4)
    weights = [0.5, 1.0, 1.5]
    outcome = combined(start, states, Merge(rule, scale=0.7, density=0.3 if rule == "ties" else None), weights)
    for (name, ours), (_, begun) in zip(outcome.tensors(), start.tensors(), strict=True):
        changes = [dict(state.tensors())[name] - begun for state in states]
        change = (
            _ties(changes, weights, 0.3)
            if rule == "ties"
            else sum(w * one for w, one in zip(weights, changes, strict=True))
        )
        np.testing.assert_allclose(ours, begun + 0.7 * change, atol=1e-6)


def test_what_falls_by_lot_is_the_same_each_time_keeps_its_share_and_is_right_on_average() -> None:
    start, *states = _states(3)
    weights = [0.5, 0.5]
    exact = combined(start, states, Merge("task_arithmetic"), weights).buffer - start.buffer
    lots = [combined(start, states, Merge("dare", density=0.4, seed=seed), weights).buffer for seed in range(400)]
    assert np.array_equal(lots[7], combined(start, states, Merge("dare", density=0.4, seed=7), weights).buffer)
    assert np.mean([np.mean(lot == start.buffer) for lot in lots]) == pytest.approx(0.6**2, abs=0.01)
    spread = np.std(lots, axis=0) / np.sqrt(len(lots))
    assert np.abs((np.mean(lots, axis=0) - start.buffer - exact) / spread).max() < 5


@pytest.mark.parametrize("rule", RULES)
def test_runs_that_learnt_the_same_come_to_the_same_where_all_is_kept(rule: str) -> None:
    start, state = _states(2)
    density = None if RULES[rule].density is None else 1.0
    weights = [1 / 2, 1 / 2] if RULES[rule].adds_up else [1.0, 1.0]
    outcome = combined(start, [state, state], Merge(rule, density=density), weights)
    np.testing.assert_allclose(outcome.buffer, state.buffer, atol=1e-6)


def _trained(recipe: Recipe, folder: Path) -> Path:
    engine, run = open_engine(recipe), RunFolder(folder)
    run.prepare(recipe, resume=False)
    train(recipe, engine, run)
    engine.close()
    return folder


@pytest.mark.parametrize("mode", ["lora", "full", "freeze"])
def test_two_runs_become_one_that_is_loaded_exported_and_gone_on_from(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, mode: str
) -> None:
    tuning = {"mode": mode}
    recipes = [make_recipe(tuning=tuning, data={"train": str(file)}) for file in site_files[:2]]
    runs = [_trained(recipe, tmp_path / f"run{number}") for number, recipe in enumerate(recipes)]
    summary = merge_runs(runs, tmp_path / "merged", Merge(weights=[3, 1]))
    engine = open_engine(recipes[0])
    ours = read_result(find_result(tmp_path / "merged").folder, engine.manifest)
    one, two = (read_result(find_result(run).folder, engine.manifest) for run in runs)
    np.testing.assert_allclose(ours.buffer, 0.75 * one.buffer + 0.25 * two.buffer, atol=1e-6)
    assert ours.digest == summary.state_digest
    account = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert [run["folder"] for run in account["runs"]] == [str(run) for run in runs]
    assert account["weights"] == [0.75, 0.25]
    load_result(find_result(tmp_path / "merged"))
    export_model(find_result(tmp_path / "merged"), tmp_path / "exported")
    engine.close()
    after = make_recipe(model={"adapters": [str(tmp_path / "merged")]}, training={"max_steps": 1})
    open_engine(after).close()


def test_runs_that_did_not_start_from_the_same_are_refused_by_what_differs(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    runs = [_trained(make_recipe(training={"seed": seed, "max_steps": 1}), tmp_path / f"seed{seed}") for seed in (0, 1)]
    with pytest.raises(InputError, match=r"seed1 started from something else than .*seed0 \(training\.seed differ\)"):
        merge_runs(runs, tmp_path / "merged", Merge())
    assert not (tmp_path / "merged").exists()
