"""Rule `fedavg`: the weighted mean (McMahan et al. 2017)."""

from __future__ import annotations

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import Section

FEDAVG = AggregationPart[Section](name="fedavg", target="strategies.fedavg:FedAvg", is_weighted_mean=True)
