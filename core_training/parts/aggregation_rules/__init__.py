"""The rules by which a server makes one state of the sites'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core_training.parts.registry import Part, Registry, S
from core_training.parts.section import Section

SECTION_KEYS = (
    *("rule", "weights", "mixing", "proximal_mu", "scaffold", "outer", "max_update_norm"),
    *("corrects", "rule_part", "mixing_part"),
)
"""Names of the section `aggregation`, in which the rules' own sections are."""


@dataclass(frozen=True, kw_only=True)
class AggregationPart(Part[S]):
    """The facts of an aggregation rule; `target` is its `strategies.aggregation_rule.AggregationRule`."""

    is_weighted_mean: bool = False
    """Whether its result is the mean, weighted as `aggregation.weights` says: a sum in a ring says that and no more."""


FEDAVG = AggregationPart[Section](name="fedavg", target="strategies.fedavg:FedAvg", is_weighted_mean=True)

AGGREGATION_RULES: Registry[AggregationPart[Any]] = Registry(
    AggregationPart, "fedloom.aggregation_rules", [FEDAVG], reserved=SECTION_KEYS
)
