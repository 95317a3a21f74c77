"""The choices of trained parameters: a light file here and a class in `core_training.tuning` for each, in one table."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from core_training.parts.registry import Registry
from core_training.parts.tuning_modes.freeze import FREEZE
from core_training.parts.tuning_modes.full import FULL
from core_training.parts.tuning_modes.ia3 import IA3
from core_training.parts.tuning_modes.lora import LORA
from core_training.parts.tuning_modes.qlora import QLORA
from core_training.parts.tuning_modes.tuning_part import TuningPart
from core_training.parts.tuning_modes.vera import VERA

_PRODUCTS = "its change is a product of products, and a mean of the factors is nowhere near the mean"
_ROTATIONS = "a mean of rotations is no rotation"
_TOKENS = "its virtual tokens are no part of any weight, so a result could not be merged, nor be another run's start"
NOT_AVERAGED = MappingProxyType(
    {
        "adalora": "each site would keep other ranks",
        **dict.fromkeys(("loha", "lokr"), _PRODUCTS),
        **dict.fromkeys(("oft", "boft", "hra"), _ROTATIONS),
        **dict.fromkeys(("prefix", "prompt", "p_tuning"), _TOKENS),
    }
)
"""Methods of PEFT that are no modes, and why."""

TUNING_MODES: Registry[TuningPart[Any]] = Registry(
    TuningPart, "fedloom.tuning_modes", [FULL, FREEZE, LORA, QLORA, IA3, VERA], reserved=("mode",)
)
