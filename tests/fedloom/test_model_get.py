"""A base model by its name on the hub: `fedloom model get`, and runs that name it, with and without fetching it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from core_training.foundation.hub_models import HubModel
from core_training.foundation.model_files import weights_digest
from core_training.recipe.reading import load_recipe
from tests import tiny
from tests.fedloom.conftest import Command
from tests.stand_in_hub import StandInHub

RecipeFile = Callable[..., Path]
ONCE = {"name_or_path": "org/tiny", "download": True}
TWO_STEPS = {"max_steps": 2}


def pinned(run: Path) -> dict[str, Any]:
    """The model's section of a run's recipe."""
    section: dict[str, Any] = yaml.safe_load((run / "recipe.yaml").read_text())["model"]
    return section


def test_a_model_is_fetched_once_and_said_where_it_lies(
    fedloom: Command, hub: StandInHub, tiny_model: Path, tmp_path: Path
) -> None:
    commit = hub.add("org/tiny", tiny_model)
    first = fedloom("model", "get", "org/tiny", "--json")
    assert first.code == 0, first.err
    folder = str(HubModel("org/tiny", commit).snapshot())
    digest = weights_digest(tiny_model)
    expected = {"name": "org/tiny", "revision": commit, "digest": digest, "folder": folder}
    assert json.loads(first.out) == {**expected, "fetched": True}
    hub.asked.clear()
    assert json.loads(fedloom("model", "get", "org/tiny", "--json").out) == {**expected, "fetched": False}
    said = fedloom("model", "get", f"org/tiny@{commit}").out
    assert f"was here already: {folder}" in said
    assert digest in said
    assert f"model: {{name_or_path: org/tiny@{commit}}}" in said
    copied = fedloom("model", "get", "org/tiny", "--to", tmp_path / "copy", "--json")
    assert json.loads(copied.out)["folder"] == str(tmp_path / "copy")
    assert weights_digest(tmp_path / "copy") == digest
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
    assert hub.asked == []


def test_what_cannot_be_fetched_is_one_line(
    fedloom: Command, hub: StandInHub, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, expected in [
        (["org/none"], "has no model of that name"),
        ([tmp_path], "is a folder here; there is nothing to fetch"),
        (["not/a/name"], "is no name of a model on the hub, such as OWNER/NAME"),
        (["org/tiny", "--to", tmp_path / "full"], "is not empty; name a new folder"),
    ]:
        outcome = fedloom("model", "get", *arguments, "--quiet")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("error: ")
        assert expected in outcome.err
        assert outcome.err.count("\n") == 1


@pytest.fixture
def trained_run(fedloom: Command, hub: StandInHub, tiny_model: Path, recipe_file: RecipeFile) -> tuple[Path, Path, str]:
    """A recipe that fetches its model, the run that it made, and the model's commit."""
    commit = hub.add("org/tiny", tiny_model)
    path = recipe_file(model=ONCE, training=TWO_STEPS)
    outcome = fedloom("train", path, "--json")
    assert outcome.code == 0, outcome.err
    assert "fetching org/tiny from the hub" in outcome.err
    return path, path.parent / "run", commit


def test_a_run_fetches_its_model_once_and_writes_down_which_it_was(
    fedloom: Command, hub: StandInHub, tiny_model: Path, trained_run: tuple[Path, Path, str]
) -> None:
    path, run, commit = trained_run
    digest = weights_digest(tiny_model)
    assert hub.fetched().count("model.safetensors") == 1
    assert pinned(run)["name_or_path"] == f"org/tiny@{commit}"
    assert pinned(run)["digest"] == digest
    first = json.loads((run / "events.jsonl").read_text().splitlines()[0])
    assert first.pop("time")
    folder = str(HubModel("org/tiny", commit).snapshot())
    assert first == {"event": "hub_model", "model": "org/tiny", "revision": commit, "digest": digest, "folder": folder}
    hub.asked.clear()
    by_folder = fedloom("train", path, f"model.name_or_path={tiny_model}", "--json", "--out", run.parent / "folder")
    again = fedloom("train", path, "--json", "--out", run.parent / "again")
    assert json.loads(again.out)["state_digest"] == json.loads(by_folder.out)["state_digest"]
    assert pinned(run.parent / "folder")["digest"] is None
    assert hub.asked == []


def test_a_run_goes_on_with_the_commit_that_it_began_with(
    fedloom: Command, hub: StandInHub, tiny_model: Path, trained_run: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, run, commit = trained_run
    whole = fedloom("train", path, "training.max_steps=4", "training.save_steps=2", "--json", "--out", tmp_path / "w")
    other = tiny.make_model(tmp_path / "other", width=64)
    hub.add("org/tiny", other)
    assert fedloom("model", "get", f"org/tiny@{hub.repositories['org/tiny'].references['main']}").code == 0
    model = HubModel("org/tiny")
    model.reference.write_text(hub.repositories["org/tiny"].references["main"])
    hub.asked.clear()
    (tmp_path / "w" / "summary.json").unlink()
    resumed = fedloom(
        *("train", path, "training.max_steps=4", "training.save_steps=2", "model.download=false", "--json"),
        *("--out", tmp_path / "w", "--resume"),
    )
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["state_digest"] == json.loads(whole.out)["state_digest"]
    assert pinned(tmp_path / "w")["name_or_path"] == f"org/tiny@{commit}"
    # A completed run needs no model to say that it is complete.
    completed = fedloom("train", path, "--resume", "--json")
    assert json.loads(completed.out) == json.loads((run / "summary.json").read_text())
    refused = fedloom("train", path, f"model.name_or_path=org/tiny@{model.snapshot().name}", "--resume")
    assert refused.code == 2
    assert "has another model" in refused.err
    assert hub.asked == []


@pytest.mark.parametrize("command", ["train", "simulate", "data show", "recipe check --measure"])
def test_nothing_is_fetched_unless_the_recipe_says_so(
    fedloom: Command, hub: StandInHub, tiny_model: Path, recipe_file: RecipeFile, site_files: list[Path], command: str
) -> None:
    hub.add("org/tiny", tiny_model)
    path = recipe_file(
        model={"name_or_path": "org/tiny"},
        topology={"kind": "federated", "rounds": 1, "local_steps": 1},
        simulation={"sites": [str(site) for site in site_files]},
    )
    words, _, option = command.partition(" --")
    arguments = [*words.split(), path, *([f"--{option}"] if option else [])]
    outcome = fedloom(*arguments)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "`fedloom model get org/tiny`, or set model.download: true" in outcome.err
    assert hub.asked == []
    outcome = fedloom(*arguments, "model.download=true")
    assert outcome.code == 0, outcome.err
    assert hub.fetched().count("model.safetensors") == 1
    hub.asked.clear()
    assert fedloom(*arguments).code == 0
    assert hub.asked == []


def test_a_simulation_and_its_result_name_the_model_as_others_can_find_it(
    fedloom: Command, hub: StandInHub, tiny_model: Path, recipe_file: RecipeFile, site_files: list[Path], tmp_path: Path
) -> None:
    commit = hub.add("org/tiny", tiny_model)
    path = recipe_file(
        model=ONCE,
        topology={"kind": "federated", "rounds": 1, "local_steps": 1},
        simulation={"sites": [str(site) for site in site_files]},
    )
    outcome = fedloom("simulate", path, "--json")
    assert outcome.code == 0, outcome.err
    assert fedloom("export", tmp_path / "run", "--to", tmp_path / "adapter").code == 0
    assert json.loads(fedloom("export", tmp_path / "run", "--to", tmp_path / "a", "--json").out)["base"] == (
        f"org/tiny@{commit}"
    )
    for folder in (tmp_path / "run" / "adapter", tmp_path / "adapter"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", commit)
    assert fedloom("chat", tmp_path / "run", "--prompt", "Pain?", "--max-tokens", "2", "--json").code == 0
    assert fedloom("chat", tmp_path / "run", "--base", tiny_model, "--prompt", "Pain?", "--max-tokens", "2").code == 0
    hub.asked.clear()
    for path in HubModel("org/tiny").cache_folder.glob("blobs/*"):
        path.unlink()
    missing = fedloom("chat", tmp_path / "run", "--prompt", "Pain?")
    assert missing.code == 2
    assert f"or fetch it with `fedloom model get org/tiny@{commit}`" in missing.err
    assert hub.asked == []


def test_weights_other_than_the_recipes_are_refused(
    fedloom: Command, tiny_model: Path, recipe_file: RecipeFile
) -> None:
    right = recipe_file(
        model={"name_or_path": str(tiny_model), "digest": weights_digest(tiny_model)}, training=TWO_STEPS
    )
    assert fedloom("train", right, "--quiet").code == 0
    wrong = fedloom("train", recipe_file(model={"digest": "0" * 64}), "--quiet")
    assert wrong.code == 2
    assert "its weights have the digest" in wrong.err
    assert "which is not model.digest" in wrong.err


def test_the_recipe_from_python_fetches_its_model_too(
    hub: StandInHub, tiny_model: Path, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    from fedloom import train

    commit = hub.add("org/tiny", tiny_model)
    recipe = load_recipe(recipe_file(model=ONCE, training=TWO_STEPS))
    train(recipe)
    assert pinned(tmp_path / "run")["name_or_path"] == f"org/tiny@{commit}"
    assert train(recipe, resume=True).state_digest


def test_a_terminal_is_shown_a_bar_and_nobody_else(
    hub: StandInHub, tiny_model: Path, environment: dict[str, str]
) -> None:
    hub.add("org/tiny", tiny_model)
    command = [sys.executable, "-m", "fedloom.cli", "model", "get", "org/tiny"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    done = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, env=environment, timeout=60)
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 0, said
    assert "model.safetensors: 100%" in said
    assert "tokenizer.json" not in said
    shutil.rmtree(HubModel("org/tiny").cache_folder)
    assert (
        subprocess.run(command, capture_output=True, env=environment, timeout=60).stderr
        == b"fetching org/tiny from the hub\n"
    )
