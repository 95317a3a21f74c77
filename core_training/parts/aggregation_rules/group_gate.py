"""Rule `group_gate`: the mean of those groups of sites whose own mean does not spoil the model on held-out records."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import Section

FEWEST_GROUPS = 3
"""Of two nobody can tell which is the bad one."""
MOST_GROUPS = 32
"""Each site tries the mean of every group, in every round."""
_USUAL_MOST = 8


class GroupGate(Section):
    """Rule `group_gate`: sites are drawn into groups, anew each round, and each group's mean is tried by all of them.

    Only sums over a group are needed, so it works in a ring and under masks. Losses are on the sites' held-out records.
    """

    groups: Annotated[int, Field(ge=FEWEST_GROUPS, le=MOST_GROUPS)] | None = Field(
        None,
        description="Groups of a round. Fewer than half of them may hold a poisoned site. Unset: as many as the sites "
        "make of the least size (one site, under masks as many as a sum takes), 3 at least and 8 at most.",
    )
    tolerance: Annotated[float, Field(ge=0)] = Field(
        0.02, description="A group is left out whose loss is above that of the middle group by more than this."
    )
    most_rise: Annotated[float, Field(ge=0)] = Field(
        0.5,
        description="A group is left out, too, whose loss is above that of the state the round began with by more than "
        "this; a round in which all are is void.",
    )

    @property
    def most_groups(self) -> int:
        """The groups that a round has at most."""
        return self.groups or _USUAL_MOST


GROUP_GATE = AggregationPart[GroupGate](
    name="group_gate",
    target="strategies.group_gate:MeanOfGroup",
    settings=GroupGate,
    in_groups=True,
    fewest=("groups", lambda settings: settings.groups or FEWEST_GROUPS),
)
