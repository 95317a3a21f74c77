"""REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.data_kinds import PROMPT
from core_training.parts.section import ClipRange, Generations, Passes, Section
from core_training.parts.stages.stage_part import StagePart


class Rloo(Section):
    """Stage `rloo`: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024)."""

    num_generations: Generations = Field(4, description="Answers to each prompt.")
    num_iterations: Passes = Field(1, description="Passes over each rollout.")
    cliprange: ClipRange = Field(0.2, description="Clipping of the answer's probability ratio.")
    kl_coef: Annotated[float, Field(ge=0)] = Field(0.05, description="Weight of the KL penalty.")


RLOO = StagePart[Rloo](
    name="rloo",
    target="core_training.stages.rloo:Rloo",
    settings=Rloo,
    reads=PROMPT,
    unit="answers",
    learning_rate=1e-6,
    adapter_learning_rate=1e-5,
    samples=True,
    refers=True,
    answers=lambda rloo: rloo.num_generations,
    passes=lambda rloo: rloo.num_iterations,
)
