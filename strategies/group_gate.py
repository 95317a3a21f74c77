"""The group gate: who is in which group, what a site says of the groups' means, and which of them are averaged. Pure.

Each round draws its sites into disjoint groups. A group's mean is tried by all sites on their held-out records, and a
group speaks with one voice: the sum of what its sites measured. So nobody has to see one site's update or loss, and a
site's lie reaches no further than the group that its update is in.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest
from core_training.foundation.trainable import EvalReport
from core_training.parts.aggregation_rules.group_gate import FEWEST_GROUPS, GroupGate
from core_training.recipe.schema import Recipe
from strategies.bounds import highest_loss
from strategies.draws import key_of
from strategies.fedavg import FedAvg

_FRACTION = 2.0**-16
_LARGEST = 2**47
"""Room for the sum of 2^15 sites in 64 bits, the loss that is taken off included."""


class MeanOfGroup(FedAvg):
    """The mean of one group's states, weighted as `aggregation.weights` says."""

    def __init__(self, manifest: Manifest, settings: GroupGate) -> None:
        super().__init__(manifest)


def drawn_groups(recipe: Recipe, number: int, sites: Collection[str]) -> list[list[str]]:
    """The groups of round `number`: each of these sites is in one of them, and their sizes are alike or one apart.

    Sites are dealt out in an order made of the recipe's seed, the round and the names, so anybody can draw again.
    """
    seed = recipe.training.seed
    ordered = sorted(sites, key=lambda name: key_of("groups", seed, number, name))
    count = recipe.groups_among(len(ordered))
    return [sorted(ordered[first::count]) for first in range(count)]


def mask_number(recipe: Recipe, number: int, *, vote: bool = False) -> int:
    """The number under which the masks of round `number` are spent, of which a site masks each once and none backwards.

    Where groups are tried a round has two: its update's, and then its vote's.
    """
    return 2 * number + vote if recipe.tries_groups else number


@dataclass(frozen=True)
class Ballot:
    """Sums over one site's held-out records, or over those of several sites: losses in steps of 2^-16.

    `weight` counts what the losses are over (see `EvalReport`); `start` is the loss of the state that the round began
    with, `losses` are those of the groups' means.
    """

    weight: int
    start: int
    losses: tuple[int, ...]

    @classmethod
    def of(cls, recipe: Recipe, start: EvalReport, tried: Sequence[EvalReport | None]) -> Ballot:
        """One site's, who evaluated the start and each mean; None is one whose loss was no finite number."""
        most = highest_loss(recipe, start.weight)
        losses = [most if report is None else min(report.loss_sum, most) for report in tried]
        return cls(start.weight, _whole(start.loss_sum), tuple(map(_whole, losses)))

    @classmethod
    def from_integers(cls, integers: Sequence[int]) -> Ballot:
        weight, start, *losses = integers
        return cls(weight, start, tuple(losses))

    def to_integers(self) -> list[int]:
        """Whole numbers whose sums read back as sums."""
        return [self.weight, self.start, *self.losses]

    def __add__(self, other: Ballot) -> Ballot:
        losses = tuple(mine + theirs for mine, theirs in zip(self.losses, other.losses, strict=True))
        return Ballot(self.weight + other.weight, self.start + other.start, losses)

    def reports(self) -> list[EvalReport]:
        """The evaluations that it says its site made: of the start, and of each mean."""
        return [EvalReport(loss * _FRACTION, self.weight, 0) for loss in (self.start, *self.losses)]

    def rises(self) -> list[float]:
        """How far each mean's loss is above that of the start; there is a weight."""
        return [(loss - self.start) * _FRACTION / self.weight for loss in self.losses]


def _whole(loss: float) -> int:
    return max(-_LARGEST, min(round(loss / _FRACTION), _LARGEST)) if math.isfinite(loss) else _LARGEST


def figures_of_a_ballot(candidates: int) -> int:
    """Whole numbers that stand for a ballot on so many means."""
    return 2 + candidates


def rises_of(ballots: Mapping[int, Ballot], candidates: int) -> list[float]:
    """How far each mean's loss is above that of the start: the median over the groups' ballots, each worth the same.

    Groups of which no site holds any record out have no say. Raises ProtocolError for too few that have one: at least
    three, and more than half.
    """
    voices = [ballot.rises() for _, ballot in sorted(ballots.items()) if ballot.weight > 0]
    if len(voices) < FEWEST_GROUPS or 2 * len(voices) <= candidates:
        raise ProtocolError(
            f"{len(voices)} of {candidates} groups tried the means on held-out records; it takes "
            f"{max(FEWEST_GROUPS, candidates // 2 + 1)} to say which are good"
        )
    return [float(median) for median in np.median(np.array(voices), axis=0)]


def let_through(rises: Sequence[float], settings: GroupGate) -> list[bool]:
    """Whether each mean is averaged: it is not much worse than the middle one, nor than the start by far."""
    middle = middle_of(rises)
    return [rise <= middle + settings.tolerance and rise <= settings.most_rise for rise in rises]


def middle_of(rises: Sequence[float]) -> float:
    """The median; of an even number the better of the two in the middle, so that half of the groups may be bad."""
    return sorted(rises)[(len(rises) - 1) // 2]
