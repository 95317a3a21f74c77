"""What can be said of the stages and tuning modes without loading them: a line each, which names where the work is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StageEntry:
    """What can be said of a stage without loading it."""

    target: str
    """`module:class` of the stage."""
    learning_rate: float
    """Usual peak learning rate where whole weights are trained; see docs/stages.md for the sources."""
    adapter_learning_rate: float
    """The same for LoRA and QLoRA."""
    unit: Literal["tokens", "pairs", "examples", "answers"]
    """What the loss is a mean over, and so what an update is weighted by."""
    head: Literal["score", "value_head"] | None = None
    """The output layer that the stage adds to the model, trained in every mode."""
    packs: bool = False
    """Whether several examples can share a row."""
    samples: bool = False
    """Whether it trains on answers that the model itself gives."""
    refers: bool = False
    """Whether its loss looks at the reference policy, the model that the run starts from."""


STAGES = {
    "pretrain": StageEntry("core_training.stages.pretrain:Pretrain", 2e-5, 2e-4, "tokens", packs=True),
    "sft": StageEntry("core_training.stages.sft:Sft", 2e-5, 2e-4, "tokens", packs=True),
    "reward": StageEntry("core_training.stages.reward:Reward", 1e-5, 1e-4, "pairs", head="score"),
    "dpo": StageEntry("core_training.stages.dpo:Dpo", 5e-7, 5e-6, "pairs", refers=True),
    "kto": StageEntry("core_training.stages.kto:Kto", 5e-7, 5e-6, "examples", refers=True),
    "orpo": StageEntry("core_training.stages.orpo:Orpo", 5e-6, 5e-5, "pairs"),
    "ppo": StageEntry(
        "core_training.stages.ppo:Ppo", 1e-6, 1e-5, "tokens", head="value_head", samples=True, refers=True
    ),
    "rloo": StageEntry("core_training.stages.rloo:Rloo", 1e-6, 1e-5, "answers", samples=True, refers=True),
    "grpo": StageEntry("core_training.stages.grpo:Grpo", 1e-6, 1e-5, "tokens", samples=True, refers=True),
    "simpo": StageEntry("core_training.stages.simpo:Simpo", 1e-6, 1e-5, "pairs"),
}

TUNING_MODES = {
    "full": "core_training.tuning.full",
    "freeze": "core_training.tuning.freeze",
    "lora": "core_training.tuning.lora",
    "qlora": "core_training.tuning.qlora",
}
