"""Stage × tuning mode in bfloat16, and in four bits where the mode is qlora: each cell one short run on this device.

A run is `fedloom train` as a person has it: two steps with a checkpoint after each, evaluations, and a result that is
read back and compared. Knows nothing of speed.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import rewards
from benchmarks.gpu.records import write_records
from benchmarks.gpu.shapes import SHAPES, model_folder
from core_training.engine.central import latest_checkpoint, train
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.errors import RunError
from core_training.parts.stages import STAGES
from core_training.parts.tuning_modes import TUNING_MODES
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder

STEPS = 2


def cells() -> Iterator[tuple[str, str]]:
    """All cells, in such an order that the first ten have every stage and every mode, and so the next."""
    modes = list(TUNING_MODES)
    for shift in range(len(modes)):
        for number, stage in enumerate(STAGES):
            yield stage, modes[(number + shift) % len(modes)]


def measure(shape: str, folder: str, seconds: float, count: int | None = None) -> dict[str, Any]:
    """Run the first `count` cells, or all; those that do not begin within so many seconds are skipped."""
    until = time.monotonic() + seconds
    found = []
    for stage, mode in list(cells())[:count]:
        cell: dict[str, Any] = {"stage": stage, "tuning": mode, "held_in": "4-bit" if mode == "qlora" else "bfloat16"}
        if time.monotonic() > until:
            cell["skipped"] = f"the matrix had {seconds:.0f} s"
        else:
            cell |= _outcome(shape, folder, stage, mode)
        found.append(cell)
    return {"cells": found, "ran": sum("loss_last" in cell for cell in found), "of": len(found)}


def _outcome(shape: str, folder: str, stage: str, mode: str) -> dict[str, Any]:
    """The figures of a cell's run, or why it failed: no failure is the end of the others."""
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as run:
            outcome = _run(_recipe(shape, folder, stage, mode), Path(run) / "run")
    except Exception as error:
        outcome = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**outcome, "seconds": time.monotonic() - began}


def _run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train to the end. Raise RunError where that was not on the device, moved nothing, or cannot be gone back to."""
    engine = open_engine(recipe)
    run = RunFolder(folder)
    run.prepare(recipe, resume=False)
    summary = train(recipe, engine, run, heeds_signals=False)
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if elsewhere := _not_on(engine, wanted):
        raise RunError(f"{elsewhere} is not on the device ({wanted})")
    if summary.state_digest == engine.initial_state.digest:
        raise RunError("training moved nothing")
    last = latest_checkpoint(run.checkpoints)
    assert last is not None, "there is one after each step"
    engine.restore(last)
    if engine.read_state().digest != summary.state_digest:
        raise RunError("the last checkpoint holds another state than the run ended with")
    engine.close()
    return {"loss_first": summary.train_loss_first, "loss_last": summary.train_loss_last}


def _not_on(engine: Engine, device: str) -> str | None:
    """The first parameter that is elsewhere, if any."""
    named = engine._base.model.named_parameters()
    return next((name for name, parameter in named if parameter.device.type != device), None)


def _recipe(shape: str, folder: str, stage: str, mode: str) -> Recipe:
    work = SHAPES[shape]
    if STAGES[stage].samples:  # prompts are as many as one batch: some for two batches, and some held out
        work = replace(work, batch_size=2 * work.records)
    document: dict[str, Any] = {
        "model": {"name_or_path": model_folder(folder, shape), "dtype": "bfloat16"},
        "stage": stage,
        "tuning": {"mode": mode, "freeze": {"trainable_layers": 1}},
        "data": {"train": str(write_records(stage, work, Path(folder) / "data" / stage)), "eval_fraction": 0.3},
        "training": {
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "max_length": work.max_length,
        },
    }
    if STAGES[stage].samples:
        document["rollout"] = {
            "reward_function": f"{rewards.__file__}:{rewards.many_letters.__name__}",
            "max_new_tokens": work.new_tokens,
        }
        document["training"]["max_length"] = work.max_length - work.new_tokens
    return Recipe.model_validate(document)
