"""What all nodes of a run agree on before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from core_training.errors import InputError
from core_training.recipe import Recipe
from strategies.mixing import MIXING, Mixing


@dataclass(frozen=True)
class RunPlan:
    """The run, its members in the order in which sums are added up, and which of them this node is.

    Raises InputError for a recipe that these members can never fulfil.
    """

    name: str
    roster: tuple[str, ...]
    run_id: str
    recipe: Recipe

    def __post_init__(self) -> None:
        needed = self.recipe.topology.minimum_sites
        if needed > len(self.roster):
            raise InputError(f"topology.minimum_sites: {needed}, but the roster has {len(self.roster)} members")

    @property
    def epochs(self) -> int:
        return self.recipe.topology.rounds or 0

    @property
    def mixing(self) -> Mixing:
        return MIXING[self.recipe.aggregation.mixing]

    @property
    def neighbours(self) -> tuple[str, ...]:
        """The nodes that this one exchanges updates with, in roster order."""
        return self.mixing.partners(self.name, self.roster, self.recipe.topology.graph)
