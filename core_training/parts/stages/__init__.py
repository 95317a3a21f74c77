"""The stages of training: a light file here and a class in `core_training.stages` for each, in one table."""

from __future__ import annotations

from typing import Any

from core_training.parts.registry import Registry
from core_training.parts.stages.dpo import DPO
from core_training.parts.stages.grpo import GRPO
from core_training.parts.stages.kto import KTO
from core_training.parts.stages.orpo import ORPO
from core_training.parts.stages.ppo import PPO
from core_training.parts.stages.pretrain import PRETRAIN
from core_training.parts.stages.reward import REWARD
from core_training.parts.stages.rloo import RLOO
from core_training.parts.stages.sft import SFT
from core_training.parts.stages.simpo import SIMPO
from core_training.parts.stages.stage_part import StagePart

STAGES: Registry[StagePart[Any]] = Registry(
    StagePart,
    "fedloom.stages",
    [PRETRAIN, SFT, REWARD, DPO, KTO, ORPO, SIMPO, PPO, RLOO, GRPO],
    reserved=(
        *("model", "stage", "tuning", "rollout", "data", "training", "deepspeed"),
        *("topology", "aggregation", "privacy", "simulation", "output"),
        *(
            "stage_part",
            "stage_settings",
            "tuning_part",
            "usual_learning_rate",
            "fewest_sites",
            "most_void_rounds",
            "needed_sites",
            "total_steps",
            "trains_parts",
            "tries_groups",
            "least_group",
            "groups_among",
            "too_few_for_groups",
            "alone",
        ),
        *("judges_by_held_out", "engine_digest", "flat", "to_yaml"),
    ),
)
