"""The rules by which gossip nodes average: who mixes with whom, and with which weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core_training.parts.aggregation_rules import SECTION_KEYS
from core_training.parts.registry import Part, Registry, S
from core_training.parts.section import Section


@dataclass(frozen=True, kw_only=True)
class MixingPart(Part[S]):
    """The facts of a mixing rule; `target` is its `strategies.mixing.Mixing`."""

    one_state: bool = False
    """Whether all nodes hold one and the same state after an undisturbed round."""
    is_weighted_mean: bool = False
    """Whether that is the mean over all, weighted as `aggregation.weights` says: a ring's sum says that and no more."""


GROUP = MixingPart[Section](name="group", target="strategies.mixing:GroupMean", one_state=True, is_weighted_mean=True)
METROPOLIS = MixingPart[Section](name="metropolis", target="strategies.mixing:Metropolis")

MIXING_RULES: Registry[MixingPart[Any]] = Registry(
    MixingPart, "fedloom.mixing_rules", [GROUP, METROPOLIS], reserved=SECTION_KEYS
)
