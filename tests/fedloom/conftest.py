"""The command line in this process, as a person meets it: arguments in; exit code, output and errors out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from core_training.recipe.schema import Recipe
from fedloom import cli


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def fedloom(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `fedloom ARGUMENTS`."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fedloom", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        assert isinstance(code, int)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Path]:
    """Write a small recipe whose output is in a new folder; keyword arguments replace or extend its sections."""

    def write(**sections: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        sections = {"output": str(tmp_path / "run"), **sections}
        path.write_text(yaml.safe_dump(make_recipe(**sections).model_dump()), encoding="utf-8")
        return path

    return write


@pytest.fixture
def environment() -> dict[str, str]:
    """For a real process: it finds this checkout."""
    root = str(Path(cli.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="session")
def finished_run(
    tiny_model: Path, site_files: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The run folder of a finished run: `kind` central or federated, `mode` lora or full, of a base in `dtype`."""

    @cache
    def run(kind: str = "central", mode: str = "lora", dtype: str = "float32") -> Path:
        from core_training.distributed.launch import opened_engine
        from core_training.engine.central import train
        from core_training.recipe.reading import parse_recipe
        from core_training.runs.run_folder import RunFolder
        from simulations import simulate

        folder = RunFolder(tmp_path_factory.mktemp("finished") / "run")
        document = {
            "model": {"name_or_path": str(tiny_model), "dtype": dtype},
            "stage": "sft",
            "tuning": {"mode": mode},
            "data": {"train": [str(p) for p in site_files], "columns": {"prompt": "question", "completion": "answer"}},
            "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_length": 64},
            "topology": {"kind": kind, "rounds": 2, "local_steps": 2},
            "simulation": {"sites": [str(path) for path in site_files]},
        }
        recipe = parse_recipe(yaml.safe_dump(document))
        if kind == "central":
            with opened_engine(recipe) as engine:
                folder.prepare(recipe, resume=False)
                train(recipe, engine, folder)
        else:
            simulate(recipe, folder)
        return folder.path

    return run
