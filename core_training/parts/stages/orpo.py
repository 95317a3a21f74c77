"""Odds-ratio preference optimisation (Hong et al. 2024)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.data_kinds import PREFERENCE
from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart


class Orpo(Section):
    """Stage `orpo`: odds-ratio preference optimisation (Hong et al. 2024)."""

    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="Weight of the odds-ratio term (the paper's λ).")


ORPO = StagePart[Orpo](
    name="orpo",
    target="core_training.stages.orpo:Orpo",
    settings=Orpo,
    reads=PREFERENCE,
    unit="pairs",
    negative=False,
    learning_rate=5e-6,
    adapter_learning_rate=5e-5,
)
