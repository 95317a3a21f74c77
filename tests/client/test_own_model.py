"""What a site ends with besides the common model: one of its own, where that is better on its own records."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.own_model import tune_own_model
from core_training.engine.engine import open_engine
from core_training.foundation.errors import DivergedError, InputError
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import total
from core_training.recipe.schema import Recipe
from core_training.recipe.sections.deepspeed import DeepSpeed
from core_training.runs import events
from core_training.runs.finished_run import find_result
from core_training.runs.result_format import read_result
from core_training.runs.run_folder import RunFolder
from simulations import simulate

MakeRecipe = Callable[..., Recipe]


def own_of(run: Path, site: str, kind: str) -> Path:
    return run / "sites" / site / (run.name if kind == "federated" else "simulation")


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_each_site_ends_with_the_better_of_two_models_on_its_own_records(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str
) -> None:
    def recipe(**topology: Any) -> Recipe:
        return make_recipe(
            topology={"kind": kind, "rounds": 2, "local_steps": 1, **topology},
            simulation={"sites": [str(path) for path in site_files]},
            data={"eval_fraction": 0.3},
        )

    plain = simulate(recipe(), RunFolder(tmp_path / "plain"))
    tuned = simulate(recipe(own_steps=8), RunFolder(tmp_path / "tuned"))
    assert (tuned.state_digest, tuned.eval_loss) == (plain.state_digest, plain.eval_loss), "the common one is as it was"
    for path in site_files:
        folder = own_of(tmp_path / "tuned", path.stem, kind)
        (told,) = RunFolder(folder).events(events.OwnModelTuned)
        assert told.eval_loss is not None
        assert told.eval_loss < told.common_eval_loss
        alone = recipe().model_copy(update={"data": recipe().data.model_copy(update={"train": str(path)})})
        engine = open_engine(alone)
        result = find_result(folder / "own")
        assert result.folder == folder / "own" / "adapter"
        engine.write_state(read_result(result.folder, engine.manifest))
        assert total(engine.evaluate()).loss == pytest.approx(told.eval_loss, rel=1e-5)


def test_where_nothing_is_better_nothing_is_left(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    recipe = make_recipe(
        topology={"kind": "federated", "rounds": 2, "local_steps": 1, "own_steps": 3},
        training={"learning_rate": 0.0},
        simulation={"sites": [str(path) for path in site_files]},
    )
    simulate(recipe, RunFolder(tmp_path / "run"))
    for path in site_files:
        folder = own_of(tmp_path / "run", path.stem, "federated")
        (told,) = RunFolder(folder).events(events.OwnModelTuned)
        assert told.eval_loss is None
        assert "no model of this site's own was better" in told.note
        assert not (folder / "own").exists()


def spoilt(start: TrainableState, by: float) -> TrainableState:
    """A common model that knows less than the base: the run's start and far too much of something."""
    noise = np.random.default_rng(0).normal(size=start.manifest.size)
    return TrainableState(start.manifest, start.buffer + np.float32(by) * noise.astype(np.float32))


def own_recipe(make_recipe: MakeRecipe, site: Path, **topology: Any) -> Recipe:
    return make_recipe(
        topology={"kind": "federated", "rounds": 1, "local_steps": 1, "own_steps": 4, **topology},
        data={"train": str(site), "eval_fraction": 0.3},
    )


def tuned_from(recipe: Recipe, common: TrainableState, folder: Path) -> events.OwnModelTuned:
    engine = open_engine(recipe)
    engine.write_state(common)
    tune_own_model(engine, recipe, common, total(engine.evaluate()), RunFolder(folder))
    (told,) = RunFolder(folder).events(events.OwnModelTuned)
    return told


@pytest.mark.parametrize("by", [0.02, 1.0])
def test_it_begins_where_the_way_from_the_runs_start_to_the_common_model_is_best(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, by: float
) -> None:
    """At a rate of 0 it ends there, too: the best of the places is the own model."""
    recipe = own_recipe(make_recipe, site_files[1], own_learning_rate=0.0)
    engine = open_engine(recipe)
    start = engine.initial_state
    common = spoilt(start, by)
    losses = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        way = start.buffer + np.float32(share) * (common.buffer - start.buffer)
        engine.write_state(TrainableState(start.manifest, way))
        losses[share] = total(engine.evaluate()).loss
    best = min(losses, key=lambda share: losses[share] or 0.0)
    told = tuned_from(recipe, common, tmp_path)
    assert best < 1
    assert (told.share, told.eval_loss) == (best, pytest.approx(losses[best], rel=1e-6))
    assert f"after 0 steps from {best:.0%} of the way" in told.note
    engine.write_state(read_result(tmp_path / "own" / "adapter", engine.manifest))
    assert total(engine.evaluate()).loss == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize(("given", "rate"), [(None, 0.0025), (3e-3, 3e-3)])
def test_it_learns_at_a_quarter_of_the_rate_unless_another_is_given(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, given: float | None, rate: float
) -> None:
    recipe = own_recipe(make_recipe, site_files[1], own_learning_rate=given)
    told = tuned_from(recipe, open_engine(recipe).initial_state, tmp_path)
    assert (told.steps, told.share) == (4, 1.0)
    written = RunFolder(tmp_path / "own").recipe
    assert (written.training.learning_rate, written.training.max_steps) == (rate, 4)


def test_ditto_pulls_each_step_back_towards_where_the_first_began(
    make_recipe: MakeRecipe, site_files: list[Path]
) -> None:
    """SGD: the second of two steps is shorter by η·μ·(what the first changed), and the first is the same."""
    rate, mu = 0.5, 0.3
    training = {"optim": "sgd", "lr_scheduler_type": "constant"}
    engine = open_engine(make_recipe(training=training, data={"train": str(site_files[1])}))
    start = engine.initial_state
    states = []
    for pull in (0.0, mu):
        tuned = engine.alone(2, rate, pull)
        tuned.write_state(start)
        for _ in range(2):
            tuned.train(1)
            states.append(tuned.read_state().buffer)
        tuned.close()
    first, free, same, pulled = states
    assert np.array_equal(first, same)
    assert np.abs(pulled - free).max() > 1e-4
    np.testing.assert_allclose(pulled, free - rate * mu * (first - start.buffer), atol=1e-7)


@pytest.mark.parametrize("key", ["own_learning_rate", "own_proximal_mu"])
def test_settings_of_steps_that_nobody_takes_are_refused(make_recipe: MakeRecipe, key: str) -> None:
    with pytest.raises(InputError, match=rf"{key}: it is of the steps after the run"):
        make_recipe(topology={"kind": "federated", "rounds": 1, key: 0.1})


def test_training_that_fails_is_told_and_the_common_model_is_there(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*_: Any) -> None:
        raise DivergedError("the training loss is no longer finite")

    monkeypatch.setattr("client.own_model._train", diverges)
    topology = {"kind": "federated", "rounds": 1, "local_steps": 1, "own_steps": 4}
    summary = simulate(make_recipe(topology=topology, simulation={"sites": [str(site_files[0])]}), RunFolder(tmp_path))
    assert summary.status == "completed"
    (told,) = RunFolder(own_of(tmp_path, site_files[0].stem, "federated")).events(events.OwnModelTuned)
    assert "it went no further: the training loss is no longer finite" in told.note


def test_what_an_earlier_end_of_the_run_left_goes(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    def recipe(rounds: int, rate: float) -> Recipe:
        topology = {"kind": "federated", "rounds": rounds, "local_steps": 1, "own_steps": 4}
        return make_recipe(
            topology=topology, training={"learning_rate": rate}, simulation={"sites": [str(site_files[0])]}
        )

    run = tmp_path / "run"
    simulate(recipe(1, 0.01), RunFolder(run))
    own = own_of(run, site_files[0].stem, "federated")
    assert (own / "own" / "adapter").exists()
    engine = open_engine(recipe(1, 0.0))
    state, report = engine.initial_state, total(engine.evaluate())
    tune_own_model(engine, recipe(1, 0.0), state, report, RunFolder(own))
    assert not (own / "own").exists()


def test_a_site_answers_in_time_however_many_steps_it_may_take(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    topology = {"kind": "gossip", "rounds": 1, "local_steps": 1, "own_steps": 10_000, "round_deadline": 2.0}
    recipe = make_recipe(topology=topology, simulation={"sites": [str(site_files[0])]})
    began = time.monotonic()
    simulate(recipe, RunFolder(tmp_path / "run"))
    assert time.monotonic() - began < 60
    (told,) = RunFolder(own_of(tmp_path / "run", site_files[0].stem, "gossip")).events(events.OwnModelTuned)
    assert 1 < told.steps < 2_500, "it looked where it had to stop"


def test_a_group_of_processes_is_refused_before_it_begins(make_recipe: MakeRecipe) -> None:
    topology = {"kind": "federated", "rounds": 2, "local_steps": 1, "own_steps": 3}
    with pytest.raises(InputError, match=r"topology\.own_steps: a DeepSpeed group trains one state"):
        make_recipe(topology=topology, deepspeed={"processes": 2})
    with pytest.raises(InputError, match="deepspeed: a group trains one state"):
        open_engine(make_recipe(topology=topology).model_copy(update={"deepspeed": DeepSpeed(stage=2)}))
