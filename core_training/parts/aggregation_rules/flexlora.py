"""Rule `flexlora`: the mean of adapters' products, at the adapters' rank (Bai et al. 2024)."""

from __future__ import annotations

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import Section

FLEXLORA = AggregationPart[Section](
    name="flexlora", target="strategies.flexlora:FlexLora", needs_each_update=True, needs_rank=True
)
