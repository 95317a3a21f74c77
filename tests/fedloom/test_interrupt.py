"""A training command that is interrupted or killed, as a person or a power cut would do it, and then resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.engine.central import train
from core_training.engine.engine import open_engine
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("signal_number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_train_stopped_by_a_signal_resumes_bit_for_bit(
    make_recipe: Callable[..., Recipe], tmp_path: Path, signal_number: int, exit_code: int
) -> None:
    recipe = make_recipe(
        tuning={"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}},
        training={"max_steps": 80, "save_steps": 5},
        output=str(tmp_path / "run"),
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "fedloom.cli", "train", str(tmp_path / "recipe.yaml"), "--json"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step-*")):
        assert running.poll() is None, running.stderr and running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal_number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == exit_code
    if exit_code == 130:
        assert "--resume" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "run" / "summary.json").exists()

    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0, resumed.stderr
    whole = RunFolder(tmp_path / "whole")
    whole.prepare(recipe, resume=False)
    expected = train(recipe, open_engine(recipe), whole)
    assert json.loads(resumed.stdout)["state_digest"] == expected.state_digest
    assert [e["event"] for e in RunFolder(tmp_path / "run").lines()].count("resumed") == 1
