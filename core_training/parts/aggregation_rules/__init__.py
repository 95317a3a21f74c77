"""The rules by which a server makes one state of the sites': a light file here and a class in `strategies` for each."""

from __future__ import annotations

from typing import Any

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart as AggregationPart
from core_training.parts.aggregation_rules.fedavg import FEDAVG as FEDAVG
from core_training.parts.aggregation_rules.fednova import FEDNOVA
from core_training.parts.aggregation_rules.flexlora import FLEXLORA
from core_training.parts.aggregation_rules.flower import FLOWER
from core_training.parts.aggregation_rules.geometric_median import GEOMETRIC_MEDIAN
from core_training.parts.aggregation_rules.group_gate import GROUP_GATE
from core_training.parts.aggregation_rules.krum import KRUM
from core_training.parts.aggregation_rules.median import MEDIAN
from core_training.parts.aggregation_rules.multi_krum import MULTI_KRUM
from core_training.parts.aggregation_rules.norm_clipped_mean import NORM_CLIPPED_MEAN
from core_training.parts.aggregation_rules.trimmed_mean import TRIMMED_MEAN
from core_training.parts.registry import Registry

SECTION_KEYS = (
    *("rule", "weights", "mixing", "proximal_mu", "scaffold", "outer", "max_update_norm"),
    *("adapters", "site_weights", "corrects", "counts_rounds", "rule_part", "mixing_part", "sharing_part"),
)
"""Names of the section `aggregation`, in which the rules' own sections are."""

AGGREGATION_RULES: Registry[AggregationPart[Any]] = Registry(
    AggregationPart,
    "fedloom.aggregation_rules",
    [
        *(FEDAVG, MEDIAN, TRIMMED_MEAN, GEOMETRIC_MEDIAN, KRUM, MULTI_KRUM, NORM_CLIPPED_MEAN, GROUP_GATE, FEDNOVA),
        *(FLEXLORA, FLOWER),
    ],
    reserved=SECTION_KEYS,
)
