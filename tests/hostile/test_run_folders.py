"""An earlier run's folder comes from others too: no file in it holds up or ends whoever reads it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.foundation.errors import InputError
from core_training.foundation.model_files import weights_digest
from core_training.models.results import export_adapter
from core_training.recipe.schema import Recipe
from core_training.runs.curve import CURVE_FILE
from core_training.runs.finished_run import find_result
from core_training.runs.run_folder import RunFolder
from core_training.stages.rewards import reward_model_digest
from fedloom.run_curves import read_runs
from tests.core_training.tuned import finished
from tests.hostile.test_text import refused

pytestmark = pytest.mark.timeout(60)
MakeRecipe = Callable[..., Recipe]
Put = Callable[[Path], object]


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.symlink_to("/usr")


@pytest.fixture
def run(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """The folder of a run that trained an adapter."""
    finished(make_recipe(), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("put", [os.mkfifo, zero, a_folder])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "fedloom.json", "notes/more.txt"])
def test_no_file_of_a_result_is_a_pipe_or_without_an_end(run: Path, name: str, put: Put) -> None:
    path = run / "adapter" / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    put(path)
    assert f"{name}: cannot be read: it is no regular file" in refused(lambda: find_result(run), InputError)


def test_every_file_of_a_value_head_or_a_model_is_looked_at(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    finished(make_recipe(stage="reward", tuning={"mode": "full"}), tmp_path / "judge")
    (tmp_path / "judge" / "model" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "judge" / "model" / "model.safetensors")
    assert "rollout.reward_model: " in refused(lambda: reward_model_digest(tmp_path / "judge"), InputError)
    assert "regular file" in refused(lambda: weights_digest(tmp_path / "judge" / "model"), InputError)


@pytest.mark.parametrize("name", ["summary.json", "events.jsonl", CURVE_FILE])
@pytest.mark.parametrize("put", [os.mkfifo, zero])
def test_no_account_of_a_run_is_a_pipe_or_without_an_end(run: Path, name: str, put: Put) -> None:
    put(run / name)
    assert f"{name}: cannot be read: it is no regular file" in refused(lambda: read_runs([run]), InputError)


NO_SUMMARIES = {
    "no UTF-8": b'{"status": "\xff"}',
    "nested lists": b"[" * 100_000,
    "closed nested lists": b'{"status": ' + b"[" * 500 + b"]" * 500 + b"}",
    "5000 digits": b'{"rounds": ' + b"9" * 5000 + b"}",
    "a list": b"[]",
    "nothing": b"",
}


@pytest.mark.parametrize("name", NO_SUMMARIES)
def test_what_is_no_summary_is_none(run: Path, name: str) -> None:
    (run / "summary.json").write_bytes(NO_SUMMARIES[name])
    assert RunFolder(run).summary() is None
    shutil.rmtree(run / "adapter")
    assert "there is no result yet" in refused(lambda: find_result(run), InputError)


@pytest.mark.parametrize(
    "line", [b'{"event": ' + b"[" * 100_000, b'{"step": 1, "loss": "\xff"}', b"null", b"\x00" * 99]
)
def test_what_is_no_line_of_events_or_of_a_curve_is_passed_over(run: Path, line: bytes) -> None:
    (run / "events.jsonl").write_bytes(line + b'\n{"event": "failed", "reason": "r"}\n')
    (run / CURVE_FILE).write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b"\n")
    assert [one["reason"] for one in RunFolder(run).lines("failed")] == ["r"]
    assert RunFolder(run).curve() == [{"step": 1, "loss": 2.0}]


def test_lines_without_an_end_are_none(run: Path) -> None:
    for name in ("events.jsonl", CURVE_FILE):
        (run / name).touch()
        os.truncate(run / name, 2**40)
    assert list(RunFolder(run).lines()) == RunFolder(run).curve() == []


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_an_adapters_settings_that_are_none_are_refused(run: Path, tmp_path: Path, content: bytes) -> None:
    (run / "adapter" / "adapter_config.json").write_bytes(content)
    said = refused(lambda: export_adapter(find_result(run), tmp_path / "out"), InputError)
    assert "adapter_config.json" in said
