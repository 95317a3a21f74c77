"""Rule `fednova`: the mean of normalised changes (Wang et al. 2020)."""

from __future__ import annotations

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import Section

FEDNOVA = AggregationPart[Section](
    name="fednova", target="strategies.fednova:FedNova", needs_each_update=True, needs_start=True, needs_steps=True
)
