"""Direct preference optimisation (Rafailov et al. 2023)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.data_kinds import PREFERENCE
from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart


class Dpo(Section):
    """Stage `dpo`: direct preference optimisation (Rafailov et al. 2023)."""

    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="Strength of the tie to the reference policy.")


DPO = StagePart[Dpo](
    name="dpo",
    target="core_training.stages.dpo:Dpo",
    settings=Dpo,
    reads=PREFERENCE,
    unit="pairs",
    learning_rate=5e-7,
    adapter_learning_rate=5e-6,
    refers=True,
)
