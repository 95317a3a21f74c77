"""The plan that a run's nodes share before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from core_training.foundation.errors import InputError
from core_training.recipe.named_sites import check_named_sites
from core_training.recipe.schema import Recipe
from strategies.mixing import Mixing, partner_in


@dataclass(frozen=True)
class RunPlan:
    """The run, its members in the order in which sums are added up, and which of them this node is.

    `rounding_secret` is the node's own, and decides how it rounds its updates (see `strategies.draws`).

    Raises InputError for a recipe that these members can never fulfil.
    """

    name: str
    roster: tuple[str, ...]
    run_id: str
    recipe: Recipe
    rounding_secret: str

    def __post_init__(self) -> None:
        for key, needed in self.recipe.fewest_sites.items():
            if needed > len(self.roster):
                raise InputError(f"{key}: {needed}, but the roster has {len(self.roster)} members")
        check_named_sites(self.recipe, self.roster)

    @property
    def rounds(self) -> int:
        return self.recipe.topology.rounds or 0

    @property
    def needed(self) -> int:
        """The fewest members whose updates are averaged."""
        return max(min(self.recipe.topology.fewest_sites, len(self.roster)), *self.recipe.fewest_sites.values())

    @property
    def most_void_rounds(self) -> int:
        """The void rounds in all that the run may have, where they have numbers of their own."""
        return self.recipe.most_void_rounds

    def doubt(self, committed: int, void_rounds: int) -> str | None:
        """The reason why no node of this run goes on from so many rounds, in words; None when one can."""
        if void_rounds >= self.most_void_rounds:
            return f"{void_rounds} void rounds; a run of {self.rounds} rounds ends at {self.most_void_rounds}"
        if committed - void_rounds > self.rounds:
            return f"round {committed}, {void_rounds} of them void; the recipe has {self.rounds} rounds"
        return None

    @property
    def believed(self) -> int:
        """The fewest peers that are believed together, so that one cannot put a state of its making in others' place.

        Of a group it is more than half of its fewest members, who hold the very same state. (Where two are enough for a
        group, there is but one to believe.) Elsewhere it is more than half of the neighbours.
        """
        if self.in_groups:
            return max(1, min(self.needed // 2 + 1, self.needed - 1))
        return min(len(self.neighbours) // 2 + 1, max(1, len(self.neighbours)))

    @property
    def stops_early(self) -> bool:
        """Whether the run may end before its last round."""
        return self.recipe.topology.early_stopping_patience is not None

    @property
    def in_groups(self) -> bool:
        """Whether nodes learn sums over a group, and not each neighbour's state."""
        return self.recipe.privacy.ring_bits is not None

    @property
    def in_one_state(self) -> bool:
        """Whether all nodes hold one and the same state after an undisturbed round."""
        return self.recipe.aggregation.mixing_part.one_state

    @cached_property
    def mixing(self) -> Mixing:
        aggregation = self.recipe.aggregation
        rule: Mixing = aggregation.mixing_part.make(aggregation)
        return rule

    @property
    def neighbours(self) -> tuple[str, ...]:
        """The nodes that this one exchanges updates with, in roster order."""
        return self.mixing.partners(self.name, self.roster, self.recipe.topology.graph)

    @property
    def one_at_a_time(self) -> bool:
        """Whether a node has one partner in a round, another in each."""
        return self.recipe.topology.graph == "one_peer" and not self.in_one_state

    def partners(self, number: int) -> tuple[str, ...]:
        """Those of them with whom it does so in round `number`."""
        if not self.one_at_a_time:
            return self.neighbours
        return partner_in(number, self.name, self.roster)
