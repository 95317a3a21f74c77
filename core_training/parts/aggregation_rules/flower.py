"""Rule `flower`: any strategy of Flower's, or a class of one's own with its interface."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.aggregation_rules.aggregation_part import AggregationPart
from core_training.parts.section import Section

_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class Flower(Section):
    """Rule `flower`: a `flwr.serverapp.strategy.Strategy`, whose `aggregate_train` makes the next state.

    Who takes part, rounds, deadlines and commits are the run's own, as with any rule.
    """

    strategy: Annotated[str, Field(pattern=_PATH)] | None = Field(
        None,
        description="`module:Class`, importable where the server runs, such as "
        "`flwr.serverapp.strategy:FedTrimmedAvg`. Sites do not load it.",
    )
    arguments: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="What the class is made with, such as `{beta: 0.2}`."
    )


FLOWER = AggregationPart[Flower](
    name="flower",
    target="flower_transport.strategy_rule:FlowerStrategy",
    settings=Flower,
    needs_each_update=True,
    needs_start=True,
    required=("strategy",),
    remembers=True,
)
