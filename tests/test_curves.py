"""Curves in every topology: where the figures of single steps lie, and that they stay there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.site import SiteService
from core_training.engine.central import train
from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from simulations import simulate
from strategies.messages import Envelope

MakeRecipe = Callable[..., Recipe]
DROPOUT = {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}
OF_STEPS = ("learning_rate", "grad_norm", "tokens_per_second")


def recipe_of(make_recipe: MakeRecipe, kind: str, files: list[Path], rounds: int = 4, **sections: Any) -> Recipe:
    return make_recipe(
        tuning=sections.pop("tuning", DROPOUT),
        training={"max_steps": 8, "logging_steps": 3, "lr_scheduler_type": "constant", **sections.pop("training", {})},
        topology={"kind": kind, "rounds": rounds, "local_steps": 2, **sections.pop("topology", {})},
        simulation={"sites": [str(path) for path in files]},
        **sections,
    )


def simulated(recipe: Recipe, path: Path, **options: Any) -> Summary:
    return simulate(recipe, RunFolder(path), **options)


def site_curves(path: Path) -> dict[str, list[dict[str, Any]]]:
    found = {curve.parts[-3]: RunFolder(curve.parent).curve() for curve in sorted(path.glob("sites/*/*/curve.jsonl"))}
    return {
        name: [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in own] for name, own in found.items()
    }


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_a_site_alone_has_the_curve_of_central_training(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str
) -> None:
    """Points at 3, 6 and 8: within a round, at its end, and at the run's."""
    shared = recipe_of(make_recipe, kind, [site_files[1]], data={"train": str(site_files[1])})
    simulated(shared, tmp_path / kind)
    central = shared.model_copy(update={"topology": shared.topology.model_copy(update={"kind": "central"})})
    folder = RunFolder(tmp_path / "central")
    folder.prepare(central, resume=False)
    train(central, open_engine(central), folder, heeds_signals=False)
    (own,) = site_curves(tmp_path / kind).values()
    assert [(row["step"], row["round"]) for row in own] == [(3, 2), (6, 3), (8, 4)]
    expected = {row["step"]: row for row in folder.curve() if "loss" in row}
    for row in own:
        for name in ("loss", "weight", "tokens", "learning_rate", "grad_norm"):
            assert row[name] == expected[row["step"]][name]


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_the_runs_own_curve_is_of_rounds_and_its_sites_are_of_steps(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str
) -> None:
    summary = simulated(recipe_of(make_recipe, kind, site_files), tmp_path)
    rows = RunFolder(tmp_path).curve()
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4]
    assert all("loss" in row and row["sites"] == 3 for row in rows[1:])
    assert (rows[0]["eval_loss"], rows[-1]["eval_loss"]) == (summary.eval_loss_initial, summary.eval_loss)
    assert not any(name in row for row in rows for name in OF_STEPS)
    assert set(site_curves(tmp_path)) == {path.stem for path in site_files}
    assert summary.curve == "curve.jsonl"


@pytest.mark.parametrize("secure", [False, True])
def test_no_figure_of_a_single_step_leaves_a_site(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    answers: list[Envelope] = []
    handle = SiteService.handle

    def heard(self: SiteService, order: Envelope) -> Envelope:
        answers.append(handle(self, order))
        return answers[-1]

    monkeypatch.setattr(SiteService, "handle", heard)
    privacy = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}} if secure else {}
    recipe = recipe_of(make_recipe, "federated", site_files, privacy=privacy, training={"logging_steps": 1})
    simulated(recipe, tmp_path)
    own = site_curves(tmp_path)
    assert all(len(rows) == 8 for rows in own.values())
    sent = "".join(answer.text for answer in answers)
    assert sent
    figures = [
        row[name] for rows in own.values() for row in rows for name in ("grad_norm", *(["loss"] if secure else []))
    ]
    assert not [figure for figure in figures if repr(figure) in sent]
    assert not [name for name in OF_STEPS if name in sent]


def test_a_killed_site_that_trains_a_round_again_has_each_step_once(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    class Killed(BaseException):
        """Stands for SIGKILL: nothing may catch it and tidy up."""

    def kill(number: int, loss: float | None) -> None:
        if number == 2:
            raise Killed

    recipe = recipe_of(make_recipe, "federated", site_files)
    simulated(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        simulated(recipe, tmp_path / "killed", on_round=kill)
    simulated(recipe, tmp_path / "killed", resume=True)
    assert site_curves(tmp_path / "killed") == site_curves(tmp_path / "whole")
    rows, expected = (RunFolder(tmp_path / name).curve() for name in ("killed", "whole"))
    assert rows == expected


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_a_finished_simulation_goes_on_to_what_more_rounds_at_once_come_to(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str
) -> None:
    short, long = (recipe_of(make_recipe, kind, site_files, rounds) for rounds in (2, 4))
    simulated(short, tmp_path / "run")
    extended = simulated(long, tmp_path / "run", resume=True)
    at_once = simulated(long, tmp_path / "at-once")
    assert extended.state_digest == at_once.state_digest
    assert extended.rounds == at_once.rounds == 4
    assert [row["round"] for row in RunFolder(tmp_path / "run").curve()] == [0, 1, 2, 3, 4]


def test_a_run_under_secure_aggregation_ends_where_it_was_to_end(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    privacy = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}
    short, long = (recipe_of(make_recipe, "federated", site_files, rounds, privacy=privacy) for rounds in (2, 4))
    RunFolder(tmp_path).prepare(short, resume=False)
    with pytest.raises(InputError, match=r"topology\.rounds: a run that aggregates securely ends where it was to end"):
        RunFolder(tmp_path).prepare(long, resume=True)


def test_under_secure_aggregation_the_best_state_is_one_that_a_round_began_with(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    """A site tells its loss of one result alone: the last state is judged by nobody before it is chosen."""
    recipe = recipe_of(
        make_recipe,
        "federated",
        site_files,
        privacy={"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}},
        training={"load_best_model_at_end": True},
    )
    summary = simulated(recipe, tmp_path)
    (chosen,) = RunFolder(tmp_path).lines("best_chosen")
    assert chosen["round"] == 3, "the loss falls all along, and four rounds begin with the states 0 to 3"
    assert summary.eval_loss == pytest.approx(chosen["eval_loss"], abs=1e-3)
