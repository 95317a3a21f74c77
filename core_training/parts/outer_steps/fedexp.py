"""Outer step `fedexp`: FedExP (Jhunjhunwala et al. 2023)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.section import Section


class Extrapolation(Section):
    """Step `fedexp`: beyond the mean, the further the more the sites' changes point different ways."""

    epsilon: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="ε, beside the squared norm of the mean change: keeps the step short where that is near 0."
    )


FEDEXP = OuterStepPart[Extrapolation](
    name="fedexp", target="strategies.outer_steps.fedexp:FedExp", settings=Extrapolation, reads_norms=True
)
