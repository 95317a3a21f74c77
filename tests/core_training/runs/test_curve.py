"""The curve: each step or round once and in order, whatever was killed, taken back or measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core_training.foundation.errors import RunError
from core_training.runs import events
from core_training.runs.curve import CurveFile
from core_training.runs.run_folder import RunFolder, Summary


def logged(step: int, loss: float, **figures: float) -> events.StepsLogged:
    return events.StepsLogged(
        step=step, loss=loss, weight=4, learning_rate=0.1, grad_norm=None, tokens=8, tokens_per_second=2.0,
        figures=figures,
    )  # fmt: skip


def evaluated(step: int, loss: float | None) -> events.Evaluated:
    return events.Evaluated(step=step, loss=loss, evaluation={})


def a_round(number: int, loss: float, eval_loss: float | None) -> events.Round:
    return events.Round(round=number, loss=loss, eval_loss=eval_loss, sites={"a": {}, "b": {}})


def short(folder: RunFolder) -> list[tuple[int, float | None, float | None]]:
    """Step or round, loss and held-out loss of each row, as a reader of the file finds them."""
    rows = map(json.loads, (folder.path / "curve.jsonl").read_text().splitlines())
    return [(row.get("step", row.get("round")), row.get("loss"), row.get("eval_loss")) for row in rows]


def test_a_row_has_all_that_was_measured_at_its_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for event in (evaluated(0, 3.0), logged(10, 2.0, reward=0.5), logged(20, 1.0), evaluated(20, 1.5)):
        folder.event(event)
    assert short(folder) == [(0, None, 3.0), (10, 2.0, None), (20, 1.0, 1.5)]
    assert folder.curve()[1] == {
        "step": 10, "loss": 2.0, "weight": 4, "learning_rate": 0.1, "grad_norm": None, "tokens": 8,
        "tokens_per_second": 2.0, "reward": 0.5,
    }  # fmt: skip


def test_rows_after_the_checkpoint_that_a_run_goes_back_to_are_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.event(logged(step, float(step)))
    again = RunFolder(tmp_path)  # another process
    again.event(events.ResumedAtStep(step=15))
    assert short(again) == [(10, 10.0, None)]
    again.event(logged(20, 1.0))
    again.event(logged(30, 2.0))
    assert short(again) == [(10, 10.0, None), (20, 1.0, None), (30, 2.0, None)]


def test_a_site_that_takes_steps_again_replaces_theirs(tmp_path: Path) -> None:
    """A site's folder has no word of going back: the server's order says it."""
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.event(logged(step, float(step)))
    for known in (folder, RunFolder(tmp_path)):
        known.event(logged(20, 1.0))
        assert short(known) == [(10, 10.0, None), (20, 1.0, None)]


def test_a_run_that_starts_anew_in_its_folder_begins_its_curve_anew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.event(logged(10, 1.0))
    folder.event(events.CentralStarted(total_steps=20, train_examples=1, eval_examples=0, truncated=0, dropped=0))
    assert short(folder) == []


def test_a_line_that_a_kill_cut_short_is_no_row(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.event(logged(10, 1.0))
    with (tmp_path / "curve.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    again = RunFolder(tmp_path)
    assert [row["step"] for row in again.curve()] == [10]
    again.event(logged(20, 2.0))
    assert short(again) == [(10, 1.0, None), (20, 2.0, None)]


def test_a_rounds_held_out_loss_stands_beside_the_state_that_it_is_of(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for event in (
        events.FederatedStarted(rounds=3),
        a_round(1, 2.0, 3.0),
        a_round(2, 1.0, None),
        a_round(3, 0.5, 1.5),
        events.LastStateEvaluated(round=3, eval_loss=1.0),
    ):
        folder.event(event)
    assert short(folder) == [(0, None, 3.0), (1, 2.0, None), (2, 1.0, 1.5), (3, 0.5, 1.0)]
    folder.event(events.ResumedAtRound(round=1))
    assert short(folder) == [(0, None, 3.0), (1, 2.0, None)]


def test_the_summary_names_the_curve_where_there_is_one(tmp_path: Path) -> None:
    def named(folder: RunFolder) -> object:
        folder.write_summary(Summary(topology="central", stage="sft", tuning="lora", status="completed"))
        return (folder.summary() or {})["curve"]

    folder = RunFolder(tmp_path)
    assert named(folder) is None
    folder.event(logged(10, 1.0))
    assert named(folder) == "curve.jsonl"


def test_a_line_that_is_no_row_ends_the_rows_and_is_replaced(tmp_path: Path) -> None:
    for damage in (b"garbage\n", b'{"step": 3', b"[1]\n"):
        folder = RunFolder(tmp_path / str(len(damage)))
        folder.event(logged(2, 2.0))
        with (folder.path / "curve.jsonl").open("ab") as file:
            file.write(damage)
        again = RunFolder(folder.path)
        assert [row["step"] for row in again.curve()] == [2]
        again.event(logged(4, 1.0))
        assert short(again) == [(2, 2.0, None), (4, 1.0, None)]


def test_what_a_disk_refuses_takes_no_earlier_figure_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = CurveFile(tmp_path / "curve.jsonl")
    curve.take(logged(2, 2.0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(RunError, match="cannot be written"):
            curve.take(evaluated(2, 1.5))
    again = RunFolder(tmp_path)
    again.event(events.ResumedAtStep(step=2))
    again.event(evaluated(2, 1.5))
    assert short(again) == [(2, 2.0, 1.5)]
