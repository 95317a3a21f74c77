"""Simple preference optimisation (Meng et al. 2024)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.data_kinds import PREFERENCE
from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart


class Simpo(Section):
    """Stage `simpo`: simple preference optimisation (Meng et al. 2024)."""

    beta: Annotated[float, Field(gt=0)] = Field(2.0, description="Scale of the length-normalised reward.")
    gamma: Annotated[float, Field(ge=0)] = Field(1.0, description="Target reward margin (the paper: γ/β about 0.5).")


SIMPO = StagePart[Simpo](
    name="simpo",
    target="core_training.stages.simpo:Simpo",
    settings=Simpo,
    reads=PREFERENCE,
    unit="pairs",
    negative=False,
    learning_rate=1e-6,
    adapter_learning_rate=1e-5,
)
