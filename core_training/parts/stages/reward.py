"""A Bradley–Terry reward model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.data_kinds import PREFERENCE
from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart


class Reward(Section):
    """Stage `reward`: a Bradley–Terry reward model."""

    center_rewards_coefficient: Annotated[float, Field(ge=0)] = Field(
        0.01, description="Weight of the squared sum of a pair's rewards, which keeps them around 0 (Eisenstein 2023)."
    )


REWARD = StagePart[Reward](
    name="reward",
    target="core_training.stages.reward:Reward",
    settings=Reward,
    reads=PREFERENCE,
    unit="pairs",
    negative=False,
    learning_rate=1e-5,
    adapter_learning_rate=1e-4,
    head="score",
)
