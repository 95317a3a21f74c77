"""Rule `multi_krum`: the weighted mean of the sites that lie nearest to most others (Blanchard et al. 2017)."""

from __future__ import annotations

from pydantic import Field

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import Count, PositiveInt, Section


class MultiKrum(Section):
    """Rule `multi_krum`: the weighted mean of those sites' states that lie nearest to most others."""

    poisoned: Count = Field(
        1, description="Sites that may send anything, b: a round takes the updates of 2b + 3 sites or more."
    )
    chosen: PositiveInt | None = Field(None, description="Sites in the mean. Unset: all but b.")


MULTI_KRUM = AggregationPart[MultiKrum](
    name="multi_krum",
    target="strategies.robust_rules.multi_krum:MeanOfNearest",
    settings=MultiKrum,
    needs_each_update=True,
    fewest=("poisoned", lambda settings: 2 * settings.poisoned + 3),
)
