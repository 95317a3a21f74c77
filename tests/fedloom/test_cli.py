"""What every command keeps to: exit codes, one JSON object, one or two lines for an error, help without delay."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import pytest

from core_training.recipe.schema import Recipe
from core_training.recipe.sections.topology import Topology
from fedloom.cli import COMMANDS
from fedloom.commands.recipe import TOPOLOGIES
from tests import tiny
from tests.fedloom.conftest import Command

RecipeFile = Callable[..., Path]

SUBCOMMANDS = [
    [],
    *([name] for name in COMMANDS),
    *(["server", name] for name in ("init", "admit", "roster", "start", "submit", "status", "stop")),
    *(["client", name] for name in ("init", "pin", "start", "status", "stop")),
    *(["p2p", name] for name in ("init", "start", "status", "stop")),
    *(["recipe", name] for name in ("check", "show", "schema", "new")),
]
_SAYS_WHAT_IT_LOADED = """
import contextlib, io, json, sys
from fedloom import cli
cli.leave = sys.exit
told = {}
for command in json.loads(sys.argv.pop()):
    sys.argv = ["fedloom", *command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    heavy = "torch transformers flwr ray deepspeed grpc numpy cryptography".split()
    told[" ".join(command)] = [code, said.getvalue(), [name for name in heavy if name in sys.modules]]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def helped() -> dict[str, Any]:
    """Each command's exit code and words when asked for help, and the heavy libraries that are loaded then.

    One process is asked for all: what none of them loads, each by itself does not load either.
    """
    program = [sys.executable, "-c", _SAYS_WHAT_IT_LOADED, json.dumps(SUBCOMMANDS)]
    return cast(dict[str, Any], json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout))


@pytest.mark.parametrize("command", SUBCOMMANDS, ids=" ".join)
def test_help_loads_no_heavy_library(helped: dict[str, Any], command: list[str]) -> None:
    code, said, loaded = helped[" ".join(command)]
    assert code == 0
    assert "Usage: " in said
    assert loaded == []


def test_a_recipe_is_started_for_every_topology_there_is() -> None:
    assert get_args(Topology.model_fields["kind"].annotation) == TOPOLOGIES


def test_the_installed_command_is_this_one(environment: dict[str, str]) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "fedloom.cli", "--version"], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.startswith("fedloom ")


def test_a_command_there_is_not_is_a_usage_error(fedloom: Command) -> None:
    outcome = fedloom("trian")
    assert outcome.code == 2
    assert "trian" in outcome.err
    assert outcome.out == ""


def test_without_a_command_the_commands_are_shown(fedloom: Command) -> None:
    outcome = fedloom()
    assert all(name in outcome.out + outcome.err for name in COMMANDS)


def test_others_words_in_a_recipe_act_on_no_terminal(fedloom: Command, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        'model: {name_or_path: "base\\e[2J\\u202e", adapters: ["run\\e]0;title\\a"]}\n'
        'stage: sft\ndata: {train: "\\e[31m.jsonl"}\n'
    )
    for command in (["recipe", "check"], ["recipe", "check", "--json"], ["recipe", "show", "--json"], ["train"]):
        outcome = fedloom(*command[:2], path, *command[2:])
        assert all(letter.isprintable() or letter == "\n" for letter in outcome.out + outcome.err), command
    assert "[2J" in fedloom("recipe", "check", path).out


@pytest.mark.parametrize("command", ["train", "simulate", ("recipe", "check")])
def test_wrong_input_is_one_line_with_exit_code_2(
    fedloom: Command, recipe_file: RecipeFile, command: str | tuple[str, ...]
) -> None:
    command = (command,) if isinstance(command, str) else command
    path = recipe_file()
    for arguments, expected in (
        (["absent.yaml"], "error: absent.yaml: no such recipe file"),
        ([path, "training.learning_rat=1"], "training.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ([path, "training.seed=low"], "training.seed: input should be a valid integer, not 'low'"),
        ([path, "training.seed"], "'training.seed': an override is KEY=VALUE"),
        (
            [path, "topology.kind=federated", "topology.rounds=1", "topology.local_steps=0"],
            "topology.local_steps: input",
        ),
    ):
        outcome = fedloom(*command, *arguments)
        assert outcome.code == 2, arguments
        assert outcome.out == ""
        assert outcome.err.startswith("error: ")
        assert expected in outcome.err
        assert outcome.err.count("\n") == 1


def test_traceback_shows_where_an_error_came_from(fedloom: Command) -> None:
    assert "Traceback" not in fedloom("recipe", "check", "absent.yaml").err
    outcome = fedloom("recipe", "check", "absent.yaml", "--traceback")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert "load_recipe" in outcome.err


def test_overrides_reach_the_recipe(fedloom: Command, recipe_file: RecipeFile) -> None:
    outcome = fedloom("recipe", "show", recipe_file(), "training.learning_rate=5e-5", "tuning.mode=full", "--json")
    document = json.loads(outcome.out)
    assert outcome.code == 0
    assert document["training"]["learning_rate"] == 5e-5
    assert document["tuning"]["mode"] == "full"


def test_a_new_recipe_is_valid_and_never_written_over_a_file(fedloom: Command, tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    assert fedloom("recipe", "new", path, "--topology", "gossip").code == 0
    assert fedloom("recipe", "check", path).code == 0
    outcome = fedloom("recipe", "new", path)
    assert (outcome.code, "exists already" in outcome.err) == (2, True)
    assert fedloom("recipe", "new", "--stage", "stf").code == 2


def test_train_writes_one_json_object_and_the_run_folder(
    fedloom: Command, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    path = recipe_file(training={"max_steps": 2})
    outcome = fedloom("train", path, "--json")
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert (summary["schema"], summary["status"], summary["topology"]) == (1, "completed", "central")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    again = fedloom("train", path, "--json", "--resume")
    assert (again.code, json.loads(again.out)) == (0, summary)
    other = fedloom("train", path, "training.seed=7", "--resume")
    assert other.code == 2
    assert "has another training" in other.err


def test_what_libraries_print_is_kept_off_standard_output(
    fedloom: Command, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core_training.engine import engine

    open_engine = engine.open_engine

    def noisy(recipe: Recipe) -> engine.Engine:
        os.write(1, b"from C\n")
        return open_engine(recipe)

    monkeypatch.setattr(engine, "open_engine", noisy)
    outcome = fedloom("train", recipe_file(training={"max_steps": 1}), "--json")
    assert json.loads(outcome.out)["status"] == "completed"
    assert "from C\n" in outcome.err


def test_quiet_says_nothing(fedloom: Command, recipe_file: RecipeFile) -> None:
    outcome = fedloom("train", recipe_file(training={"max_steps": 1}), "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


@pytest.mark.parametrize("command", ["train", "simulate"])
def test_there_is_nothing_to_resume_where_no_run_was(fedloom: Command, recipe_file: RecipeFile, command: str) -> None:
    path = recipe_file(topology={"kind": "federated", "rounds": 1, "local_steps": 1})
    sites = [f"simulation.sites={{a: {path.parent / 'a.jsonl'}}}"]
    tiny.write_jsonl(path.parent / "a.jsonl", tiny.questions(0, 10))
    outcome = fedloom(command, path, *sites, "--resume", "--quiet")
    assert outcome.code == 2
    assert "there is no run to resume here" in outcome.err
    assert not (path.parent / "run").exists()


def test_a_simulation_of_one_site_works(fedloom: Command, recipe_file: RecipeFile, site_files: list[Path]) -> None:
    path = recipe_file(
        topology={"kind": "federated", "rounds": 2, "local_steps": 1}, simulation={"sites": [str(site_files[0])]}
    )
    outcome = fedloom("simulate", path, "--json")
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert list(summary["sites"]) == ["site0"]
    assert (summary["rounds"], summary["sites"]["site0"]["rounds"]) == (2, 2)


def test_a_central_recipe_is_no_simulation(fedloom: Command, recipe_file: RecipeFile) -> None:
    outcome = fedloom("simulate", recipe_file())
    assert outcome.code == 2
    assert "topology.kind: a simulation is 'federated' or 'gossip'" in outcome.err


def bad_data(kind: str, path: Path) -> str:
    """Write a bad data set; returns what the error must say after the file's name."""
    good = b"".join(json.dumps(record).encode() + b"\n" for record in tiny.questions(0, 40))
    content, expected = {
        "absent": (None, "' matches no file"),
        "empty": (b"", " holds no record"),
        "no column": (good + b'{"question": "why?"}\n', ", line 41: stage sft needs messages or question+answer"),
        "no JSON": (good + b"why?\n", ", line 41: not valid JSON"),
        "no UTF-8": (good + b'{"question": "\xff"}\n', ", line 41: not valid UTF-8"),
        "cut gzip": (gzip.compress(good)[:-40], ", after line "),
        "all too long": (json.dumps({"question": "why? " * 99, "answer": "so"}).encode(), "raise it"),
    }[kind]
    if content is not None:
        path.write_bytes(content)
    return expected


@pytest.mark.parametrize("command", ["train", "simulate"])
@pytest.mark.parametrize("kind", ["absent", "empty", "no column", "no JSON", "no UTF-8", "cut gzip", "all too long"])
def test_bad_data_is_named_with_exit_code_2_and_nothing_is_started(
    fedloom: Command, recipe_file: RecipeFile, tmp_path: Path, command: str, kind: str
) -> None:
    data = tmp_path / ("data.jsonl.gz" if kind == "cut gzip" else "data.jsonl")
    expected = bad_data(kind, data)
    path = recipe_file(
        data={"train": str(data)},
        topology={"kind": "federated", "rounds": 1, "local_steps": 1},
        simulation={"sites": {"north": str(data)}},
    )
    outcome = fedloom(command, path, "--json")
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert expected in outcome.err
    assert str(data) in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lacks", ["tokenizer.json", "chat_template.jinja"])
def test_a_model_folder_that_lacks_something_is_named(
    fedloom: Command, recipe_file: RecipeFile, tiny_model: Path, tmp_path: Path, lacks: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        if file.name != lacks:
            (folder / file.name).write_bytes(file.read_bytes())
    outcome = fedloom("train", recipe_file(model={"name_or_path": str(folder)}))
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: model.name_or_path: {folder}")
    assert lacks.split(".")[0].replace("_", " ") in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_folder_that_is_no_run_is_left_alone(fedloom: Command, recipe_file: RecipeFile, tmp_path: Path) -> None:
    path = recipe_file()
    outcome = fedloom("train", path, "--out", tmp_path)
    assert outcome.code == 2
    assert "holds a recipe.yaml, but no run; name another folder with --out" in outcome.err
    assert path.exists()
    (tmp_path / "file").write_text("")
    outcome = fedloom("train", path, "--out", tmp_path / "file")
    assert outcome.code == 2
    assert "file cannot be made a run folder" in outcome.err


def test_an_earlier_run_is_moved_aside(fedloom: Command, recipe_file: RecipeFile, tmp_path: Path) -> None:
    path = recipe_file(training={"max_steps": 1})
    assert fedloom("train", path, "--quiet").code == 0
    first = (tmp_path / "run" / "summary.json").read_bytes()
    assert fedloom("train", path, "--quiet", "training.seed=1").code == 0
    assert (tmp_path / "run.1" / "summary.json").read_bytes() == first


def test_a_failed_run_ends_with_1_and_its_reason(fedloom: Command, recipe_file: RecipeFile) -> None:
    outcome = fedloom("train", recipe_file(training={"learning_rate": 1e38, "optim": "sgd", "max_grad_norm": 0}))
    assert outcome.code == 1
    assert "the training loss is no longer finite at step" in outcome.err
    assert "training.learning_rate" in outcome.err


def test_a_full_disk_ends_with_1_and_the_run_goes_on_when_there_is_room(
    fedloom: Command, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    path = recipe_file(training={"max_steps": 4, "save_steps": 2})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        outcome = fedloom("train", path, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 1
    assert "step-00000002 could not be written" in outcome.err
    assert outcome.err.count("\n") == 1
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    resumed = fedloom("train", path, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    whole = fedloom("train", path, "--json", "--out", tmp_path / "whole")
    assert json.loads(resumed.out)["state_digest"] == json.loads(whole.out)["state_digest"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_an_interrupted_run_ends_with_the_signals_code_says_how_to_resume_and_does(
    fedloom: Command, recipe_file: RecipeFile, tmp_path: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    path = recipe_file(training={"max_steps": 4000, "save_steps": 5})
    process = subprocess.Popen(
        [sys.executable, "-m", "fedloom.cli", "train", str(path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert out == ""
    said = err.strip().splitlines()[-1]
    assert said.startswith("interrupted at step ")
    assert "--resume goes on" in said
    step = int(said.split()[3])
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    another = fedloom("train", path, "training.max_steps=9", "--resume")
    assert (another.code, "has another training" in another.err) == (2, True)


def test_a_second_interrupt_is_130_too(fedloom: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("core_training.recipe.reading.load_recipe", interrupted)
    monkeypatch.delitem(sys.modules, "fedloom.commands.recipe", raising=False)
    outcome = fedloom("recipe", "check", "any.yaml")
    monkeypatch.delitem(sys.modules, "fedloom.commands.recipe", raising=False)
    assert outcome.code == 130
    assert outcome.err == "interrupted\n"
