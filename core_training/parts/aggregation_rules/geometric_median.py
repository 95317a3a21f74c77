"""Rule `geometric_median`: the state with the least sum of distances to the sites' (Pillutla et al. 2022)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import PositiveInt, Section


class GeometricMedian(Section):
    """Rule `geometric_median`: the state with the least weighted sum of distances to the sites' (RFA)."""

    smoothing: Annotated[float, Field(gt=0)] = Field(
        1e-6, description="A distance below it counts as this much, so that no site is divided by nothing."
    )
    iterations: PositiveInt = Field(100, description="The most steps of Weiszfeld's; it ends when nothing moves.")


GEOMETRIC_MEDIAN = AggregationPart[GeometricMedian](
    name="geometric_median",
    target="strategies.robust_rules.geometric_median:SmoothedWeiszfeld",
    settings=GeometricMedian,
    needs_each_update=True,
)
