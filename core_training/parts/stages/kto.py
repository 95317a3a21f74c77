"""Kahneman–Tversky optimisation (Ethayarajh et al. 2024)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.data_kinds import FEEDBACK
from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart


class Kto(Section):
    """Stage `kto`: Kahneman–Tversky optimisation (Ethayarajh et al. 2024)."""

    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="Strength of the tie to the reference policy.")
    desirable_weight: Annotated[float, Field(gt=0)] = Field(1.0, description="Weight of the desirable examples.")
    undesirable_weight: Annotated[float, Field(gt=0)] = Field(1.0, description="Weight of the undesirable examples.")


KTO = StagePart[Kto](
    name="kto",
    target="core_training.stages.kto:Kto",
    settings=Kto,
    reads=FEEDBACK,
    unit="examples",
    negative=False,
    learning_rate=5e-7,
    adapter_learning_rate=5e-6,
    refers=True,
    rows_compared="estimates a divergence from each batch",
)
