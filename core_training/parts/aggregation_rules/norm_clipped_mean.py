"""Rule `norm_clipped_mean`: the weighted mean of changes that are cut to one length (Sun et al. 2019)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import Section


class NormClippedMean(Section):
    """Rule `norm_clipped_mean`: the weighted mean of the sites' changes, the longest of them shortened."""

    norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The L2 norm that a longer change is shortened to. Unset: the median of the round's norms."
    )


NORM_CLIPPED_MEAN = AggregationPart[NormClippedMean](
    name="norm_clipped_mean",
    target="strategies.robust_rules.norm_clipped_mean:MeanOfShortened",
    settings=NormClippedMean,
    needs_each_update=True,
    needs_start=True,
)
