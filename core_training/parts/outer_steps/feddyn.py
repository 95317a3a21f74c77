"""Outer step `feddyn`: FedDyn (Acar et al. 2021), with a correction of each site's local steps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.section import Section


class DynamicRegularisation(Section):
    """Step `feddyn`: local steps are pulled towards the round's start and away from where the site itself has gone."""

    alpha: Annotated[float, Field(gt=0)] = Field(
        0.1, description="α: the strength of the pull. Small: rounds go far and swing; large: they go slowly."
    )


FEDDYN = OuterStepPart[DynamicRegularisation](
    name="feddyn",
    target="strategies.outer_steps.feddyn:FedDyn",
    settings=DynamicRegularisation,
    correction="core_training.engine.correction:FedDyn",
)
