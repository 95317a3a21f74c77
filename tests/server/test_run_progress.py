"""What is said of runs: whoever follows one is told when nobody works on it, and sites' words are shown as words."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from core_training.foundation import background
from core_training.foundation.errors import RunError
from core_training.recipe.schema import Recipe
from core_training.runs.events import Event, Failed, FederatedStarted, Quarantined, Round, RoundVoid
from core_training.runs.run_folder import RunFolder
from fedloom import console
from fedloom.commands import server as command
from server import run_progress
from server.deployment import init_federation, run_states
from server.federation import Address, Federation
from server.run_progress import follow


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return init_federation(tmp_path / "federation", Address(port=9), [])


@pytest.fixture
def run(federation: Federation, make_recipe: Callable[..., Recipe]) -> RunFolder:
    run = RunFolder(federation.runs / "r")
    run.keep_recipe(make_recipe(topology={"kind": "federated", "rounds": 3, "local_steps": 1}).to_yaml())
    return run


def test_a_run_that_nobody_starts_to_work_on_is_followed_no_longer(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_progress, "_STARTS_WITHIN", 0.2)
    run.event(FederatedStarted(rounds=3))
    said: list[Event] = []
    assert follow(run.path, said.append, lambda: False) == {}
    assert said == [FederatedStarted(rounds=3)]


def test_a_run_that_changes_hands_is_followed_on(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_progress, "_REPLACED_WITHIN", 30.0)
    answers = iter([True, False, True])

    def is_worked_on() -> bool:
        now = next(answers, None)
        if now is None:
            (run.path / "summary.json").write_text(json.dumps({"status": "completed"}))
        return bool(now)

    assert follow(run.path, lambda event: None, is_worked_on) == {"status": "completed"}


def test_an_unfinished_run_without_a_process_is_said_to_stand_still(federation: Federation, run: RunFolder) -> None:
    run.event(Failed(reason="no disk"))
    (state,) = run_states(federation)
    assert state.note == "failed: no disk; nobody works on it: `fedloom server start` goes on with it"
    with background.claim(federation.run_lock("r")):
        (state,) = run_states(federation)
        assert state.note == "failed: no disk"


def test_the_words_of_a_site_are_neither_markup_nor_control_characters(
    federation: Federation, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    run.event(Quarantined(site="a", round=1, reason="[/red] [bold]no\x1b[2J\u202e disk[/bold]"))
    shown = CliRunner().invoke(command.app, ["status", "--folder", str(federation.folder)])
    assert shown.exit_code == 4, shown.exception
    assert "r: a was set aside: [/red] [bold]no [2J  disk[/bold]; nobody works on it" in shown.stdout


def test_a_void_round_is_counted_and_told(
    federation: Federation, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    share = {"loss": None, "eval_loss": None}
    run.event(Round(round=1, loss=2.5, eval_loss=3.5, sites={"a": share, "b": share}))
    shown = CliRunner().invoke(command.app, ["status", "--folder", str(federation.folder)]).stdout
    assert "│ r   │ 1/3   │ 2.5000 │ 3.5000        │ a, b                      │ unattended │" in shown
    run.event(RoundVoid(round=2, reason="1 of 2 sites are there"))
    shown = CliRunner().invoke(command.app, ["status", "--folder", str(federation.folder)]).stdout
    assert "│ 1/3, 1 void │ 2.5000 │ 3.5000        │  " in shown
    assert "\nr: round 2 is void and changed nothing: 1 of 2 sites are there; nobody works on it" in shown


@pytest.mark.parametrize("columns", ["80", None], ids=["80 columns", "no terminal"])
def test_a_narrow_terminal_crops_nothing_of_a_status(
    federation: Federation, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, columns: str | None
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    name = "hospital-of-the-northern-district-20261130-093000"
    run = RunFolder(federation.runs / name)
    run.keep_recipe(make_recipe(topology={"kind": "federated", "rounds": 3, "local_steps": 1}).to_yaml())
    sites = {f"hospital-number-{number}-of-the-north": {"loss": 2.5, "eval_loss": None} for number in range(4)}
    run.event(Round(round=1, loss=2.5, eval_loss=3.5, sites=sites))
    shown = CliRunner().invoke(command.app, ["status", "--folder", str(federation.folder)]).stdout
    lines = [line for line in shown.splitlines() if line.startswith(("│", "┃"))]
    assert all(len(line) <= 80 for line in lines) or columns is None
    rows = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    cells = ["".join(parts) for parts in zip(*(row for row in rows if len(row) == 6), strict=True)]
    for said in (name, "1/3", "2.5000", "3.5000", ",".join(f"{site}2.5000" for site in sites), "unattended"):
        assert any(said in cell.replace(" ", "") for cell in cells), (said, shown)
    assert "…" not in shown


def test_who_follows_a_run_sees_it_go_past_a_void_round(
    federation: Federation, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.event(RoundVoid(round=1, reason="few"))
    share = {"loss": None, "eval_loss": None}
    run.event(Round(round=2, loss=1.0, eval_loss=None, sites={"a": share}, rounds_done=1))
    run.event(Failed(reason="no disk"))
    said = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=said, width=200))
    with pytest.raises(RunError, match="nobody works on it"):
        command._follow(federation, "r", as_json=False, quiet=False)
    assert [line.strip() for line in said.getvalue().splitlines()] == [
        "round 1 is void and changed nothing: few",
        "r: round 1/3 loss 1.0000, 1 sites",
        "failed: no disk",
    ]
