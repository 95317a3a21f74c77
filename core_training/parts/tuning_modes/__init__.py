"""The choices of trained parameters: a light file here and a class in `core_training.tuning` for each, in one table."""

from __future__ import annotations

from typing import Any

from core_training.parts.registry import Registry
from core_training.parts.tuning_modes.freeze import FREEZE
from core_training.parts.tuning_modes.full import FULL
from core_training.parts.tuning_modes.lora import LORA
from core_training.parts.tuning_modes.qlora import QLORA
from core_training.parts.tuning_modes.tuning_part import TuningPart

TUNING_MODES: Registry[TuningPart[Any]] = Registry(
    TuningPart, "fedloom.tuning_modes", [FULL, FREEZE, LORA, QLORA], reserved=("mode",)
)
