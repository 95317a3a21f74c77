"""Group-relative policy optimisation (Shao et al. 2024)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.data_kinds import PROMPT
from core_training.parts.section import ClipRange, Generations, Passes, Section
from core_training.parts.stages.stage_part import StagePart


class Grpo(Section):
    """Stage `grpo`: group-relative policy optimisation (Shao et al. 2024)."""

    num_generations: Generations = Field(4, description="Answers to each prompt.")
    num_iterations: Passes = Field(1, description="Passes over each rollout.")
    cliprange: ClipRange = Field(0.2, description="Clipping of the token's probability ratio.")
    kl_coef: Annotated[float, Field(ge=0)] = Field(0.04, description="Weight of the KL term in the loss.")
    scale_rewards: bool = Field(True, description="Divide by the group's standard deviation.")


GRPO = StagePart[Grpo](
    name="grpo",
    target="core_training.stages.grpo:Grpo",
    settings=Grpo,
    reads=PROMPT,
    unit="tokens",
    learning_rate=1e-6,
    adapter_learning_rate=1e-5,
    samples=True,
    refers=True,
    answers=lambda grpo: grpo.num_generations,
    passes=lambda grpo: grpo.num_iterations,
)
