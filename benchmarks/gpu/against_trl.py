"""The same figures of TRL's trainers on the same records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.engine.sides import Trl
from benchmarks.gpu.device import Memory
from benchmarks.gpu.records import write_records
from benchmarks.gpu.rewards import many_letters
from benchmarks.gpu.shapes import SHAPES, model_folder
from benchmarks.gpu.throughput import EPOCHS, GENERATIONS, figures

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "liger": {"use_liger_kernel": True},
    "bf16 model": {"model_init_kwargs": {"dtype": "bfloat16"}},
}
"""What TRL's configuration is given. By its defaults it computes in bfloat16 over float32 weights, and recomputes."""


def measure(shape: str, folder: str, stage: str, setting: str) -> dict[str, Any]:
    """Train as many epochs as ours, with LoRA; figures of those after the first."""
    memory, work = Memory(), SHAPES[shape]
    arguments: dict[str, Any] = {"max_length": work.max_length, "per_device_train_batch_size": work.batch_size}
    if stage == "grpo":
        arguments = {
            "judge": many_letters,
            "num_generations": GENERATIONS,
            "max_completion_length": work.new_tokens,
            "per_device_train_batch_size": work.batch_size * GENERATIONS,  # it counts answers
        }
    file = write_records(stage, work, Path(folder) / "data")
    trl = Trl(model_folder(folder, shape), str(file), stage, EPOCHS, **arguments, **SETTINGS[setting])
    return figures(shape, stage, "lora", trl.train()) | memory.peaks()
