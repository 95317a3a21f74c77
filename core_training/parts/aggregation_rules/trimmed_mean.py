"""Rule `trimmed_mean`: the mean of each value without its largest and smallest (Yin et al. 2018)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import Section


class TrimmedMean(Section):
    """Rule `trimmed_mean`: each value is the mean of the sites' without its largest and smallest. Unweighted."""

    share: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.2, description="Share of the sites left out at either end, rounded up: at least as many as may be poisoned."
    )


TRIMMED_MEAN = AggregationPart[TrimmedMean](
    name="trimmed_mean",
    target="strategies.robust_rules.trimmed_mean:TrimmedMeanOfValues",
    settings=TrimmedMean,
    needs_each_update=True,
)
