"""Rule `krum`: the state of the site that lies nearest to most others (Blanchard et al. 2017)."""

from __future__ import annotations

from pydantic import Field

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import Count, Section


class Krum(Section):
    """Rule `krum`: the state of one site, the one that lies nearest to most others. Unweighted."""

    poisoned: Count = Field(
        1, description="Sites that may send anything, b: a round takes the updates of 2b + 3 sites or more."
    )


KRUM = AggregationPart[Krum](
    name="krum",
    target="strategies.robust_rules.krum:NearestToMost",
    settings=Krum,
    needs_each_update=True,
    fewest=("poisoned", lambda settings: 2 * settings.poisoned + 3),
)
