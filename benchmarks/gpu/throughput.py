"""Tokens a second, MFU and peak memory of our engine in one stage, tuning mode and shape."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine.sides import Epoch, Ours
from benchmarks.gpu import rewards
from benchmarks.gpu.device import Memory, describe
from benchmarks.gpu.flops import flops_per_token
from benchmarks.gpu.records import write_records
from benchmarks.gpu.shapes import SHAPES, model_folder
from core_training.parts.tuning_modes.lora import Lora

EPOCHS = 3
WARM_UP_EPOCHS = 1
GENERATIONS = 4


def measure(shape: str, folder: str, stage: str, tuning: str, *, liger: bool = False) -> dict[str, Any]:
    """Train a few epochs in bfloat16; figures of those after the first."""
    memory, recipe = Memory(), sections(shape, folder, stage, tuning)
    recipe["training"]["use_liger_kernel"] = liger
    ours = Ours(recipe, EPOCHS)
    epochs = [ours.train_epoch() for _ in range(EPOCHS)]
    return figures(shape, stage, tuning, epochs) | memory.peaks()


def sections(shape: str, folder: str, stage: str, tuning: str) -> dict[str, Any]:
    """The recipe of a shape's work in a stage, all else at its default."""
    work = SHAPES[shape]
    made: dict[str, Any] = {
        "model": {"name_or_path": model_folder(folder, shape), "dtype": "bfloat16"},
        "stage": stage,
        "tuning": {"mode": tuning},
        "data": {"train": str(write_records(stage, work, Path(folder) / "data"))},
        "training": {"max_length": work.max_length, "per_device_train_batch_size": work.batch_size},
    }
    if stage == "grpo":
        made["rollout"] = {
            "reward_function": f"{rewards.__file__}:{rewards.many_letters.__name__}",
            "max_new_tokens": work.new_tokens,
        }
        made["grpo"] = {"num_generations": GENERATIONS}
        made["training"]["max_length"] = work.max_length - work.new_tokens
    return made


def figures(shape: str, stage: str, tuning: str, epochs: Sequence[Epoch]) -> dict[str, Any]:
    """What epochs after the first come to."""
    counted = epochs[WARM_UP_EPOCHS:]
    speed = statistics.median(epoch.tokens / epoch.seconds for epoch in counted)
    flops = speed * flops_per_token(stage, tuning, SHAPES[shape], Lora().r)
    peak = describe()["peak_bf16_flops"]
    return {
        "tokens_per_second": speed,
        "flops": flops,
        "mfu": None if peak is None else flops / peak,
        "tokens": counted[0].tokens,
        "seconds_of_epochs": [epoch.seconds for epoch in epochs],
    }
