"""Packed rows beside padded ones, by attention implementation."""

from __future__ import annotations

from typing import Any

from benchmarks.engine.sides import Ours
from benchmarks.gpu.device import Memory
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.throughput import EPOCHS, figures, sections
from core_training.foundation.errors import InputError


def measure(shape: str, folder: str, attention: str) -> dict[str, Any]:
    """LoRA fine-tuning with padded rows, with packed ones, and with each batch packed into one long row.

    An implementation that would not keep the examples of packed rows apart is refused, which is `refused`.
    """
    work = SHAPES[shape]
    layouts = {
        "padded": {"packing": False},
        "packed": {"packing": True},
        "one row": {
            "packing": True,
            "per_device_train_batch_size": 1,
            "max_length": work.max_length * work.batch_size,
        },
    }
    return {name: _measured(shape, folder, attention, training) for name, training in layouts.items()}


def _measured(shape: str, folder: str, attention: str, training: dict[str, Any]) -> dict[str, Any]:
    memory, recipe = Memory(), sections(shape, folder, "sft", "lora")
    recipe["model"]["attn_implementation"] = attention
    recipe["training"] |= training
    try:
        ours = Ours(recipe, EPOCHS)
    except InputError as error:
        return {"refused": str(error)}
    epochs = [ours.train_epoch() for _ in range(EPOCHS)]
    return figures(shape, "sft", "lora", epochs) | memory.peaks()
