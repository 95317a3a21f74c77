"""A central run's curve, evaluations, early stopping and best state; also when it was stopped on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core_training.engine.central import train
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.errors import InputError
from core_training.foundation.trainable import EvalReport
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder, Summary

MakeRecipe = Callable[..., Recipe]
DROPOUT = {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}
MEASURED_BY_THE_CLOCK = ("tokens_per_second",)


def run(recipe: Recipe, path: Path, *, resume: bool = False, on_step: Any = lambda *_: None) -> Summary:
    folder = RunFolder(path)
    engine = open_engine(recipe)
    folder.prepare(recipe, resume=resume)
    return train(recipe, engine, folder, on_step, resume=resume, heeds_signals=False)


def curve(path: Path) -> list[dict[str, Any]]:
    """The rows, without what the clock decides."""
    rows = RunFolder(path).curve()
    return [{name: value for name, value in row.items() if name not in MEASURED_BY_THE_CLOCK} for row in rows]


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def kill_at(deadly: int) -> Callable[[int, int], None]:
    def on_step(step: int, total: int) -> None:
        if step == deadly:
            raise Killed

    return on_step


def by_hand(recipe: Recipe) -> list[dict[str, float]]:
    """Loss, units, tokens, rate and gradient of each step, from the engine's parts and PyTorch's own norm."""
    engine = open_engine(recipe)
    steps = []
    for _ in range(engine.total_steps):
        loop = engine._current
        rate = loop.optimizer.param_groups[0]["lr"]
        norms: list[float] = []

        def watch(optimizer: Any, *_: Any, found: list[float] = norms) -> None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            found.append(math.sqrt(sum(float(grad.double().square().sum()) for grad in grads)))

        hook = loop.optimizer.register_step_pre_hook(watch)
        report = engine.train(1)
        hook.remove()
        steps.append(
            {"loss": report.loss_mean, "weight": report.weight, "tokens": report.tokens, "rate": rate, "norm": norms[0]}
        )
    return steps


def test_a_point_is_the_mean_over_the_steps_since_the_one_before(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    training = {"max_steps": 7, "logging_steps": 3, "gradient_accumulation_steps": 2, "warmup_steps": 2}
    recipe = make_recipe(training={**training, "max_grad_norm": 0.0})
    summary = run(recipe, tmp_path / "run")
    steps = by_hand(recipe)
    rows = [row for row in RunFolder(tmp_path / "run").curve() if "loss" in row]
    assert [row["step"] for row in rows] == [3, 6, 7]
    for row, taken in zip(rows, (steps[0:3], steps[3:6], steps[6:7]), strict=True):
        weight = sum(step["weight"] for step in taken)
        assert row["loss"] == pytest.approx(sum(step["loss"] * step["weight"] for step in taken) / weight, rel=1e-12)
        assert (row["weight"], row["tokens"]) == (weight, sum(step["tokens"] for step in taken))
        assert row["learning_rate"] == taken[-1]["rate"]
        assert row["grad_norm"] == pytest.approx(sum(step["norm"] for step in taken) / len(taken), rel=1e-5)
        assert row["tokens_per_second"] > 0
    assert sum(row["tokens"] for row in rows) == summary.tokens_trained
    assert summary.curve == "curve.jsonl"


def test_the_norm_is_that_before_clipping(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    norms = []
    for most in (0.0, 1e-3):
        recipe = make_recipe(training={"max_steps": 1, "max_grad_norm": most})
        run(recipe, tmp_path / str(most))
        norms.append(RunFolder(tmp_path / str(most)).curve()[-1]["grad_norm"])
    assert norms[0] == norms[1] > 1e-3


@pytest.mark.parametrize("killed_at", [2, 5, 7, 8])
def test_a_run_that_was_killed_and_resumed_has_the_curve_of_one_that_was_not(
    make_recipe: MakeRecipe, tmp_path: Path, killed_at: int
) -> None:
    """Points at 3, 6 and 9, checkpoints at 4 and 8: the sums since the last point are part of a checkpoint."""
    recipe = make_recipe(
        tuning=DROPOUT, training={"max_steps": 9, "save_steps": 4, "eval_steps": 2, "logging_steps": 3}
    )
    run(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed", on_step=kill_at(killed_at))
    run(recipe, tmp_path / "killed", resume=True)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert [row["step"] for row in curve(tmp_path / "whole")] == [0, 2, 3, 4, 6, 8, 9]


def held_out_losses(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Have the evaluation at each step give this loss."""

    def evaluate(self: Engine) -> dict[str, EvalReport]:
        return {"site0": EvalReport(losses[self.step], 1, 1)}

    monkeypatch.setattr(Engine, "evaluate", evaluate)


def test_eval_steps_say_when_the_run_is_evaluated(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(training={"max_steps": 5, "eval_steps": 2, "save_steps": 3}), tmp_path)
    assert [event.step for event in RunFolder(tmp_path).events(events.Evaluated)] == [0, 2, 4, 5]


def test_a_run_stops_when_the_held_out_loss_falls_no_more(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out_losses(monkeypatch, {0: 3.0, 2: 2.0, 4: 2.5, 6: 2.0, 8: 0.1})
    recipe = make_recipe(training={"max_steps": 8, "eval_steps": 2}, topology={"early_stopping_patience": 2})
    summary = run(recipe, tmp_path)
    folder = RunFolder(tmp_path)
    assert [event.step for event in folder.events(events.StoppedEarlyAtStep)] == [6]
    assert (summary.eval_loss, summary.status) == (2.0, "completed")
    # What is there to go on from is the state in which it stopped.
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000006"]


@pytest.mark.parametrize("killed_at", [None, 3, 5])
def test_patience_and_the_best_state_outlast_a_kill(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int | None
) -> None:
    held_out_losses(monkeypatch, {0: 3.0, 1: 2.0, 2: 1.0, 3: 2.5, 4: 2.6, 5: 2.7, 6: 0.1})
    recipe = make_recipe(
        tuning=DROPOUT,
        training={"max_steps": 6, "eval_steps": 1, "save_steps": 2, "load_best_model_at_end": True},
        topology={"early_stopping_patience": 3},
    )
    if killed_at is not None:
        with pytest.raises(Killed):
            run(recipe, tmp_path / "run", on_step=kill_at(killed_at))
    summary = run(recipe, tmp_path / "run", resume=killed_at is not None)
    engine = open_engine(recipe)
    engine.train(2)
    assert summary.state_digest == engine.read_state().digest
    assert (summary.eval_loss, summary.sites["site0"].eval_loss) == (1.0, 1.0)
    engine.save_model(tmp_path / "expected")
    saved, expected = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run" / "adapter", tmp_path / "expected")
    )
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    folder = RunFolder(tmp_path / "run")
    assert [(event.step, event.eval_loss) for event in folder.events(events.BestChosen)] == [(2, 1.0)]
    assert [event.step for event in folder.events(events.StoppedEarlyAtStep)] == [5]


def test_the_last_state_is_the_result_where_it_is_the_best(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "eval_steps": 2}
    plain = run(make_recipe(training=settings), tmp_path / "plain")
    best = run(make_recipe(training={**settings, "load_best_model_at_end": True}), tmp_path / "best")
    assert best.state_digest == plain.state_digest
    assert not list(RunFolder(tmp_path / "best").events(events.BestChosen))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"training": {"load_best_model_at_end": True}}, "training.load_best_model_at_end"),
        ({"topology": {"early_stopping_patience": 1}}, "topology.early_stopping_patience"),
    ],
)
def test_nothing_held_out_to_judge_by_is_said_before_training(
    make_recipe: MakeRecipe, tmp_path: Path, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(InputError, match=rf"{key}: no records are held out to judge by; give data\.eval or"):
        make_recipe(**settings, data={"eval_fraction": 0.0})
    with pytest.raises(InputError, match=rf"{key}: none of the records is held out to judge by"):
        run(make_recipe(**settings, data={"eval_fraction": 1e-9}), tmp_path / "run")
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """It has neither the sums of the curve nor the figures of the best state."""
    recipe = make_recipe(tuning=DROPOUT, training={"max_steps": 6, "save_steps": 3})
    whole = run(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        run(recipe, tmp_path / "run", on_step=kill_at(4))
    kept = tmp_path / "run" / "checkpoints" / "step-00000003"
    progress = torch.load(kept / "loop" / "progress.pt", weights_only=True)
    del progress["figures"]
    torch.save(progress, kept / "loop" / "progress.pt")
    notes = json.loads((kept / "notes.json").read_text())
    new = ("best_eval_loss", "best_at", "evaluations_without_gain", "evaluated_at")
    (kept / "notes.json").write_text(json.dumps({name: value for name, value in notes.items() if name not in new}))
    assert run(recipe, tmp_path / "run", resume=True).state_digest == whole.state_digest


# A run that is made longer


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "inverse_sqrt"])
def test_a_finished_run_goes_on_to_what_more_steps_at_once_come_to(
    make_recipe: MakeRecipe, tmp_path: Path, schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    warmup = {"warmup_steps": 2} if schedule != "constant" else {}
    settings = {"lr_scheduler_type": schedule, "logging_steps": 2, "gradient_accumulation_steps": 3, **warmup}
    short, long = (make_recipe(tuning=DROPOUT, training={**settings, "max_steps": steps}) for steps in (4, 8))
    run(short, tmp_path / "run")
    extended = run(long, tmp_path / "run", resume=True)
    at_once = run(long, tmp_path / "at-once")
    assert extended.state_digest == at_once.state_digest
    assert extended.tokens_trained == at_once.tokens_trained
    rows, expected = curve(tmp_path / "run"), curve(tmp_path / "at-once")
    assert {**rows[2], "eval_loss": None} == {**expected[2], "eval_loss": None}, "it was evaluated at its first end"
    assert rows[:2] + rows[3:] == expected[:2] + expected[3:]
    assert not [record for record in caplog.records if "schedule" in record.getMessage()]


def test_a_schedule_with_an_end_is_that_of_the_longer_run_from_there_on(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    linear = {"lr_scheduler_type": "linear", "logging_steps": 1}
    short, long = (make_recipe(training={"max_steps": steps, **linear}) for steps in (4, 8))
    run(short, tmp_path / "run")
    run(long, tmp_path / "run", resume=True)
    rates = [row["learning_rate"] for row in curve(tmp_path / "run") if "loss" in row]
    assert rates == pytest.approx([0.01 * share for share in (1, 3 / 4, 2 / 4, 1 / 4, 4 / 8, 3 / 8, 2 / 8, 1 / 8)])
    said = [record.getMessage() for record in caplog.records if "schedule" in record.getMessage()]
    assert said == [
        "training.lr_scheduler_type: from here on the learning rate is that of a linear schedule over 8 steps; up to "
        "here it was that over 4 steps"
    ]


def test_a_longer_run_that_is_killed_has_not_ended(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    short, long = (make_recipe(training={"max_steps": steps, "save_steps": 2}) for steps in (2, 6))
    run(short, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert folder.completed(short) is not None
    assert folder.completed(long) is None
    with pytest.raises(Killed):
        run(long, tmp_path / "run", resume=True, on_step=kill_at(5))
    assert folder.completed(long) is None
    assert run(long, tmp_path / "run", resume=True).status == "completed"
    assert folder.completed(long) is not None


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"max_steps": 3}, "has another training: it was to take 6 steps, and can only be made longer"),
        ({"max_steps": None}, "has another training: it was to take 6 steps, and can only be made longer"),
        ({"max_steps": 8, "seed": 1}, "has another training; use its recipe.yaml"),
    ],
)
def test_a_run_cannot_be_made_shorter_or_another(
    make_recipe: MakeRecipe, tmp_path: Path, training: dict[str, Any], message: str
) -> None:
    run(make_recipe(training={"max_steps": 6}), tmp_path / "run")
    before = (tmp_path / "run" / "summary.json").read_bytes()
    with pytest.raises(InputError, match=message):
        run(make_recipe(training=training), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


def test_passes_can_be_made_more_and_steps_of_them_no_fewer(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def recipe(**length: Any) -> Recipe:
        return make_recipe(training={"max_steps": None, "lr_scheduler_type": "constant", **length})

    run(recipe(num_train_epochs=1), tmp_path / "run")
    two = run(recipe(num_train_epochs=2), tmp_path / "run", resume=True)
    assert two.state_digest == run(recipe(num_train_epochs=2), tmp_path / "at-once").state_digest
    with pytest.raises(InputError, match="was to take 2 passes over the data, and can only be made longer"):
        run(recipe(max_steps=3), tmp_path / "run", resume=True)


def test_how_the_curve_is_kept_may_change_on_the_way(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(make_recipe(training={"save_steps": 2}), tmp_path / "run", on_step=kill_at(4))
    otherwise = make_recipe(training={"save_steps": 2, "logging_steps": 1, "report_to": "csv"})
    run(otherwise, tmp_path / "run", resume=True)
    assert [row["step"] for row in curve(tmp_path / "run")] == [0, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "curve.csv").exists()
