"""Where people start fedloom from: folders, streams, paths and names as shells, cron and other people leave them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import typer
import yaml
from rich.console import Console

from core_training.recipe.reading import load_recipe, parse_recipe
from fedloom import cli, console, machine
from fedloom.options import _HomePath, as_file
from tests import tiny
from tests.fedloom.conftest import Command

RecipeFile = Callable[..., Path]

FEDERATED = {"kind": "federated", "rounds": 1, "local_steps": 1}


# --- folders


@pytest.mark.parametrize("command", ["train", "simulate"])
def test_a_folder_that_holds_no_run_is_refused_and_stays_as_it_was(
    fedloom: Command, recipe_file: RecipeFile, tmp_path: Path, command: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "adapter").write_text("a year's work")
    for left in ([], ["checkpoints"]):  # another tool's checkpoints make it no run of fedloom's
        for name in left:
            (folder / name / "step-00000001").mkdir(parents=True)
        for resume in ([], ["--resume"]):
            outcome = fedloom(command, recipe_file(topology=FEDERATED), "--out", folder, *resume)
            assert outcome.code == 2
            assert f"{folder} holds no run, but other things (adapter" in outcome.err
            assert outcome.err.count("\n") == 1
        assert (folder / "adapter").read_text() == "a year's work"
        assert sorted(path.name for path in folder.iterdir()) == sorted(["adapter", *left])


@pytest.mark.parametrize(
    "command",
    [
        ["server", "init"],
        ["client", "init", "--name", "a", "--server", "h:1", "--ca", "CA", "--data", "n=x", "--model", "m=./y"],
        ["p2p", "init", "--name", "a", "--listen", "127.0.0.1:1", "--data", "n=x", "--model", "m=./y"],
    ],
    ids=lambda command: command[0],
)
def test_keys_are_put_into_no_folder_of_other_things(fedloom: Command, tmp_path: Path, command: list[str]) -> None:
    assert fedloom("server", "init", "--folder", tmp_path / "f").code == 0
    command = [str(tmp_path / "f" / "keys" / "ca.crt") if word == "CA" else word for word in command]
    folder = tmp_path / "home"
    folder.mkdir(mode=0o755)
    (folder / "ca.crt").write_text("mine")
    outcome = fedloom(*command, "--folder", folder)
    assert (outcome.code, "is not empty" in outcome.err) == (2, True)
    assert [path.name for path in folder.iterdir()] == ["ca.crt"]
    assert ((folder / "ca.crt").read_text(), folder.stat().st_mode & 0o777) == ("mine", 0o755)
    (tmp_path / "file").write_text("")
    outcome = fedloom(*command, "--folder", tmp_path / "file" / "below")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


def test_an_empty_folder_is_taken_and_one_whose_run_was_killed_at_once(
    fedloom: Command, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".recipe.yaml.4711").write_text("sta")
    assert fedloom("train", recipe_file(training={"max_steps": 1}), "--quiet", "--out", folder).code == 0
    assert (folder / "summary.json").is_file()


@pytest.mark.parametrize("command", ["train", "simulate"])
@pytest.mark.parametrize("place", ["file/run", "file", "/proc/run", "x" * 300, "closed/run"])
def test_a_place_where_no_folder_can_be_made_is_named_in_a_line(
    fedloom: Command,
    recipe_file: RecipeFile,
    site_files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    place: str,
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir()
    may = os.access
    # Nothing is closed to root, as whom tests may run.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and may(path, mode))
    out = tmp_path / place
    path = recipe_file(topology=FEDERATED, simulation={"sites": {"a": str(site_files[0])}})
    outcome = fedloom(command, path, "--out", out, "--quiet")
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("error: ")
    assert out.name in outcome.err
    assert outcome.err.count("\n") == 1


# --- streams


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)], ids=str)
def test_a_run_needs_no_standard_streams(
    recipe_file: RecipeFile, tmp_path: Path, environment: dict[str, str], closed: tuple[int, ...]
) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    command = [sys.executable, "-m", "fedloom.cli", "train", str(recipe_file(training={"max_steps": 1})), "--json"]
    ended = subprocess.run(
        command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=close, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
    for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a pipe that nobody reads", "a full disk"])
def test_a_run_goes_on_where_its_words_cannot_be_written(
    recipe_file: RecipeFile, tmp_path: Path, environment: dict[str, str], where: str
) -> None:
    if where == "a full disk":
        written = os.open("/dev/full", os.O_WRONLY)
    else:
        read, written = os.pipe()
        os.close(read)
    path = recipe_file(training={"max_steps": 2, "logging_steps": 1})
    command = [sys.executable, "-m", "fedloom.cli", "train", str(path)]
    ended = subprocess.run(command, env=environment, stdout=written, stderr=written, check=False, timeout=120)
    os.close(written)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
    assert ended.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["recipe", "show"], ["recipe", "check"], ["train", "--json"]], ids=" ".join)
def test_an_output_that_cannot_be_written_is_one_line(
    recipe_file: RecipeFile, tmp_path: Path, environment: dict[str, str], arguments: list[str]
) -> None:
    path = recipe_file(training={"max_steps": 1})
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "fedloom.cli", *arguments, str(path)],
            env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: standard output cannot be written: No space left on device"
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


# --- paths


def _commands(command: click.Command) -> list[click.Command]:
    below = getattr(command, "commands", {}).values()
    return [command, *(one for group in below for one in _commands(group))]


def test_every_path_of_every_command_knows_the_home_folder() -> None:
    root = typer.main.get_command(cli.app)
    context = click.Context(root)
    paths = [
        (command.name, parameter.name, parameter.type)
        for name in cli.COMMANDS
        for command in _commands(root.get_command(context, name))  # type: ignore[attr-defined]
        for parameter in command.params
        if isinstance(parameter.type, click.Path)
    ]
    assert len(paths) > 20
    assert [one for one in paths if not isinstance(one[2], _HomePath)] == []


def test_the_home_folder_is_known_on_the_command_line_and_in_a_recipe(
    fedloom: Command, recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe_file(
        data={"train": ["~/a.jsonl", "b~.jsonl"]}, simulation={"sites": {"a": "~/s.jsonl"}}, output="~/runs",
        rollout={"reward_function": {"~/f.py:g": 1.0}}, model={"adapters": ["~/run"]}, deepspeed={"config": "~/ds"},
    )  # fmt: skip
    outcome = fedloom("recipe", "show", "~/recipe.yaml", "data.cache=~/cache", "--json")
    assert outcome.code == 0, outcome.err
    known = json.loads(outcome.out)
    home = str(tmp_path)
    assert known["data"]["train"] == [f"{home}/a.jsonl", "b~.jsonl"]
    assert known["data"]["cache"] == f"{home}/cache"
    assert known["simulation"]["sites"] == {"a": f"{home}/s.jsonl"}
    assert known["rollout"]["reward_function"] == {f"{home}/f.py:g": 1.0}
    assert known["model"]["adapters"] == [f"{home}/run"]
    assert known["deepspeed"]["config"] == f"{home}/ds"
    assert known["output"] == f"{home}/runs"
    assert fedloom("server", "init", "--folder=~/federation").code == 0
    assert (tmp_path / "federation" / "federation.yaml").is_file()


def test_a_recipe_from_outside_is_told_nothing_of_the_home_folder(recipe_file: RecipeFile) -> None:
    assert parse_recipe(recipe_file(data={"train": "~/a"}).read_text()).data.train == "~/a"


def test_a_sites_own_paths_know_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from client.site_config import load_site_config

    monkeypatch.setenv("HOME", str(tmp_path))
    site = {
        "name": "a",
        "data": {"notes": "~/notes.jsonl", "odd": "~nobody-of-that-name/x.jsonl"},
        "models": {"m": "~/m"},
        "runs": {"r": "~/r"},
        "deepspeed": {"config": "~/ds.json"},
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    config = load_site_config(tmp_path)
    assert config.data == {
        "notes": [f"{tmp_path}/notes.jsonl"],
        "odd": [f"{tmp_path}/~nobody-of-that-name/x.jsonl"],
    }
    assert (config.models["m"], config.runs["r"]) == (f"{tmp_path}/m", f"{tmp_path}/r")
    assert config.deepspeed.config == f"{tmp_path}/ds.json"


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_recipe_can_come_from_standard_input(
    fedloom: Command, recipe_file: RecipeFile, piped: Callable[[bytes], None]
) -> None:
    text = recipe_file().read_bytes()
    piped(text)
    outcome = fedloom("recipe", "show", "-", "training.seed=7", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["training"]["seed"] == 7
    for wrong, said in ((b"", "there is no recipe on it"), (b"\xff", "cannot be read as UTF-8"), (b"a: [", "line 1")):
        piped(wrong)
        outcome = fedloom("recipe", "check", "-")
        assert outcome.code == 2
        assert outcome.err.startswith("error: standard input")
        assert said in outcome.err


def test_other_processes_get_a_recipe_from_standard_input_as_a_file(
    recipe_file: RecipeFile, piped: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(recipe_file().read_bytes())
    monkeypatch.setattr(sys, "argv", ["fedloom", "train", "-", "--out", "x"])
    recipe = load_recipe("-")
    with as_file(Path("-"), recipe) as arguments:
        assert (arguments[0], arguments[2:]) == ("train", ["--out", "x"])
        assert load_recipe(arguments[1]) == recipe
    assert not Path(arguments[1]).exists()


# --- square brackets


def test_the_doctor_names_the_extra_to_install(fedloom: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.Finding("ray", machine.State.OPTIONAL, "[red]none[/]", "pip install 'fedloom[simulation]'")
    monkeypatch.setattr("fedloom.commands.doctor.examine", lambda: [found])
    outcome = fedloom("doctor")
    assert "pip install 'fedloom[simulation]'" in outcome.out
    assert "[red]none[/]" in outcome.out


def test_names_and_paths_are_printed_with_their_brackets(
    fedloom: Command, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    data = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.questions(0, 20))
    path = recipe_file(topology=FEDERATED, simulation={"sites": {"a": str(data)}})
    out = tmp_path / "[bold]run[/] :smile:"
    outcome = fedloom("simulate", path, "--out", out)
    assert outcome.code == 0, outcome.err
    assert f"completed in 0 s, 1 rounds, 0 void: {out}\n" in outcome.err.replace("in 1 s", "in 0 s").replace(
        "in 2 s", "in 0 s"
    )
    again = fedloom("train", path, "topology.kind=central", "training.max_steps=1", "--out", out)
    assert f"{out} held an earlier run" in again.err
    assert str(out) in fedloom("report", out).err


def test_a_progress_bar_shows_a_label_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=shown, force_terminal=True, width=200))
    with console.ticking("[bold]r[/]", "round") as ticker:
        ticker.advance(1, 2, "site [b] is there")
    assert "[bold]r[/]" in shown.getvalue()
    assert "site [b] is there" in shown.getvalue()


def test_rich_is_asked_for_a_console_in_one_place_alone() -> None:
    root = Path(cli.__file__).parent
    asking = [path.name for path in root.rglob("*.py") if "rich.console import" in path.read_text(encoding="utf-8")]
    assert asking == ["console.py"]
    assert not any("rich.markup" in path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
