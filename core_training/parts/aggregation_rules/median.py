"""Rule `median`: the middle of the sites' values, each value by itself (Yin et al. 2018)."""

from __future__ import annotations

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import Section

MEDIAN = AggregationPart[Section](name="median", target="strategies.robust_rules.median:Median", needs_each_update=True)
