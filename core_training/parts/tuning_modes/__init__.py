"""The choices of trained parameters: a light file here and a class in `core_training.tuning` for each, in one table."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from core_training.parts.registry import Registry
from core_training.parts.tuning_modes.freeze import FREEZE
from core_training.parts.tuning_modes.full import FULL
from core_training.parts.tuning_modes.ia3 import IA3
from core_training.parts.tuning_modes.lora import LORA
from core_training.parts.tuning_modes.lora_xs import LORA_XS
from core_training.parts.tuning_modes.qlora import QLORA
from core_training.parts.tuning_modes.tuning_part import TuningPart
from core_training.parts.tuning_modes.vera import VERA

_PRODUCTS = "its change is a product of products, and a mean of the factors is nowhere near the mean"
_ROTATIONS = "a mean of rotations is no rotation"
_TOKENS = "its virtual tokens are no part of any weight, so a result could not be merged, nor be another run's start"
_MIXTURES = "it mixes adapters that were trained before, and other sites have others"
_NOT_OFFERED = "it is not offered; mode lora, ia3 or vera comes nearest"
_OTHERS = (
    *(
        "adamss",
        "beft",
        "bone",
        "c3a",
        "deft",
        "delora",
        "fourierft",
        "frod",
        "glora",
        "gralora",
        "hira",
        "lily",
        "miss",
    ),
    *("osf", "peanut", "pvera", "randlora", "road", "shadow", "shira", "supertuning", "tinylora", "unilora", "vblora"),
    "waveft",
)
NOT_AVERAGED = MappingProxyType(
    {
        "adalora": "each site would keep other ranks",
        **dict.fromkeys(("loha", "lokr"), _PRODUCTS),
        **dict.fromkeys(("oft", "boft", "hra", "psoft"), _ROTATIONS),
        **dict.fromkeys(("prefix", "prompt", "p_tuning", "cpt", "cartridge", "adaption_prompt"), _TOKENS),
        **dict.fromkeys(("prefix_tuning", "prompt_tuning", "multitask_prompt_tuning"), _TOKENS),
        **dict.fromkeys(("xlora", "poly"), _MIXTURES),
        **dict.fromkeys(_OTHERS, _NOT_OFFERED),
        "ln_tuning": "it is not offered; mode freeze trains norms: tuning.freeze.trainable_modules",
        "trainable_tokens": "it is not offered; model.add_tokens adds tokens, whose rows are trained",
        "dora": "it is a setting of mode lora: tuning.lora.use_dora: true",
        "rslora": "it is a setting of mode lora: tuning.lora.use_rslora: true",
        "pissa": "it is a setting of mode lora: tuning.lora.init_lora_weights: pissa",
        "olora": "it is a setting of mode lora: tuning.lora.init_lora_weights: olora",
    }
)
"""PEFT's methods that are no modes, by their names there and those they are known by, and why."""

TUNING_MODES: Registry[TuningPart[Any]] = Registry(
    TuningPart, "fedloom.tuning_modes", [FULL, FREEZE, LORA, QLORA, IA3, VERA, LORA_XS], reserved=("mode",)
)
