"""A DeepSpeed group of two processes (gloo, CPU) against one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core_training.central import total
from core_training.engine import open_engine
from core_training.recipe import Recipe
from core_training.state import TrainableState

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.slow

LAUNCH = (
    "import sys, core_training.offline; from core_training.launch import run_as_group; "
    "sys.exit(run_as_group(2, sys.argv[1], sys.argv[2:]))"
)


def run_group(module: str, *arguments: object) -> None:
    command = [sys.executable, "-c", LAUNCH, module, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16"), (2, "bfloat16")],
)
def test_a_written_state_is_what_the_group_evaluates_trains_from_and_reads_back(
    make_recipe: MakeRecipe, tmp_path: Path, stage: int, dtype: str
) -> None:
    """DeepSpeed's master copies silently undo a write to the parameters alone."""
    settings = {
        "model": {"dtype": dtype},
        "tuning": {"mode": "full" if stage != 3 else "lora"},
        "training": {"learning_rate": 0.0, "per_device_train_batch_size": 2},
    }
    alone = open_engine(make_recipe(**settings))
    start = alone.read_state()
    noise = np.random.default_rng(0).normal(0, 0.3 if stage != 3 else 1.0, start.buffer.shape).astype(np.float32)
    target = TrainableState(start.manifest, start.buffer + noise)
    alone.write_state(target)
    expected = total(alone.evaluate()).loss

    recipe = make_recipe(**settings, deepspeed={"processes": 2, "stage": stage})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "target").write_bytes(target.to_bytes())
    run_group(
        "tests.core_training.group_program", tmp_path / "recipe.yaml", tmp_path / "target", tmp_path / "result.json"
    )
    result = json.loads((tmp_path / "result.json").read_text())
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert result["engine"] == "DeepSpeedEngine"
    assert abs(result["before"] - expected) > 3 * tolerance
    assert result["read_back"] <= (0.0 if dtype == "float32" else 2e-2)
    assert result["after_write"] == pytest.approx(expected, abs=tolerance)
    assert result["after_step"] == pytest.approx(expected, abs=tolerance)
    assert result["after_restore"] == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("stage", "mode"), [(2, "full"), (3, "lora")])
def test_losses_of_a_group_equal_those_of_one_process(
    make_recipe: MakeRecipe, tmp_path: Path, stage: int, mode: str
) -> None:
    """Two processes with half the batch each, against one; and LoRA under ZeRO-3 is exported whole."""
    settings = {"tuning": {"mode": mode}, "training": {"max_steps": 5, "learning_rate": 1e-3}}
    engine = open_engine(make_recipe(**settings))
    report = engine.train(5)
    expected = total(engine.evaluate()).loss

    recipe = make_recipe(
        **{**settings, "training": {**settings["training"], "per_device_train_batch_size": 2}},
        deepspeed={"processes": 2, "stage": stage},
        output=str(tmp_path / "run"),
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "fedloom.cli", "train", str(tmp_path / "recipe.yaml"), "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    summary = json.loads(finished.stdout)
    assert summary["train_loss_first"] == pytest.approx(report.loss_first, abs=2e-5)
    assert summary["eval_loss"] == pytest.approx(expected, abs=2e-4)
    assert summary["tokens_trained"] == report.loss_tokens
    exported = next((tmp_path / "run").glob("*/*model.safetensors"))
    from safetensors.numpy import load_file

    shapes = {name.removeprefix("base_model.model."): array.shape for name, array in load_file(exported).items()}
    assert shapes == {spec.name: spec.shape for spec in engine.manifest.tensors}
