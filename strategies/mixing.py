"""The averaging of gossip nodes: who mixes with whom, with which weights, and the weighted mean itself.

Pure arithmetic: every node that is given the same contributions computes the same state, bit for bit. Knows no clock,
no network and no rounds. What can be said of a rule without loading it is in `core_training.parts.mixing_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core_training.foundation.state import TrainableState

Graph = Mapping[str, frozenset[str]]

_BLOCK = 1 << 20
"""Elements averaged at a time: the float64 accumulator takes 8 MB, however large the state is."""


@dataclass(frozen=True)
class Contribution:
    """One node's part in a round: its state, its weight, and the number of partners it exchanges with.

    `wants_to_stop`: it sees no more to gain, which is for the nodes to agree on.
    """

    name: str
    state: TrainableState
    weight: float
    degree: int
    wants_to_stop: bool = False


class Mixing(Protocol):
    """A mixing rule, made of its settings where it has any."""

    def partners(self, name: str, roster: Sequence[str], graph: str) -> tuple[str, ...]:
        """The nodes that `name` exchanges with, in roster order."""
        ...

    def mix(self, own: Contribution, others: Sequence[Contribution], roster: Sequence[str]) -> TrainableState:
        """The node's next state."""
        ...


class GroupMean:
    """All in one group: the weighted mean, as a server averages (McMahan et al. 2017)."""

    def partners(self, name: str, roster: Sequence[str], graph: str) -> tuple[str, ...]:
        return tuple(member for member in roster if member != name)

    def mix(self, own: Contribution, others: Sequence[Contribution], roster: Sequence[str]) -> TrainableState:
        ordered = sorted([own, *others], key=lambda one: roster.index(one.name))
        return weighted_mean([one.state for one in ordered], [one.weight for one in ordered])


class Metropolis:
    """Neighbours on a graph, with Metropolis–Hastings weights: W_ij = 1/(1+max(d_i, d_j)), W_ii = 1 − Σ W_ij.

    Each node says its own live degree with its state, so that both ends of an edge use the same weight (Xiao and Boyd
    2004). The plain mean over all nodes is preserved, and ‖X⁺−X̄‖ ≤ ρ‖X−X̄‖ with ρ = ‖W − 11ᵀ/n‖₂.
    """

    def partners(self, name: str, roster: Sequence[str], graph: str) -> tuple[str, ...]:
        neighbours = GRAPHS[graph](roster)[name]
        return tuple(member for member in roster if member in neighbours)

    def mix(self, own: Contribution, others: Sequence[Contribution], roster: Sequence[str]) -> TrainableState:
        # A partner that came back in mid-round may bring one more state than was announced.
        degree = max(own.degree, len(others))
        weights = {one.name: metropolis_weight(degree, one.degree) for one in others}
        weights[own.name] = 1.0 - math.fsum(weights.values())
        ordered = sorted([own, *others], key=lambda one: roster.index(one.name))
        return weighted_mean([one.state for one in ordered], [weights[one.name] for one in ordered])


def complete(roster: Sequence[str]) -> Graph:
    """Everyone is everyone's neighbour."""
    return {name: frozenset(roster) - {name} for name in roster}


def ring(roster: Sequence[str]) -> Graph:
    """Neighbours are the one before and the one after in the roster, which closes on itself."""
    count = len(roster)
    return {
        name: frozenset({roster[place - 1], roster[(place + 1) % count]}) - {name} for place, name in enumerate(roster)
    }


def exponential(roster: Sequence[str]) -> Graph:
    """Neighbours are those 1, 2, 4, 8, … places before and after in the roster, which closes on itself.

    A word spreads in ⌈log₂ n⌉ rounds, and each has about 2·log₂ n neighbours (Ying et al. 2021, who let words run one
    way; both ways the weights of an edge agree at its ends, so that the mean is kept whoever is away).
    """
    count = len(roster)
    steps = [1 << power for power in range((count - 1).bit_length())]
    return {
        name: frozenset(roster[(place + way * step) % count] for step in steps for way in (1, -1)) - {name}
        for place, name in enumerate(roster)
    }


def one_peer(roster: Sequence[str]) -> Graph:
    """Neighbours are those whose place differs in one binary digit, of whom each round has one: see `partner_in`.

    Where there are 2ᵏ nodes, k rounds lead all of them to the very mean (Ying et al. 2021, the one-peer hypercube).
    """
    rounds = range((len(roster) - 1).bit_length())
    return {name: frozenset(p for r in rounds for p in _pair(roster, place, r)) for place, name in enumerate(roster)}


def _pair(roster: Sequence[str], place: int, digit: int) -> tuple[str, ...]:
    """The node whose place differs in this binary digit, if there is one."""
    other = place ^ (1 << digit)
    return (roster[other],) if other < len(roster) else ()


GRAPHS = {"complete": complete, "ring": ring, "exponential": exponential, "one_peer": one_peer}


def partner_in(number: int, name: str, roster: Sequence[str]) -> tuple[str, ...]:
    """The one with whom a node exchanges in round `number` where it has one partner at a time; none for some places."""
    turns = (len(roster) - 1).bit_length()
    return _pair(roster, roster.index(name), (number - 1) % turns) if turns else ()


def metropolis_weight(degree: int, other_degree: int) -> float:
    """The weight of an edge between two nodes with these numbers of neighbours."""
    return 1.0 / (1 + max(degree, other_degree))


def weighted_mean(states: Sequence[TrainableState], weights: Sequence[float]) -> TrainableState:
    """Σ w_i x_i / Σ w_i, summed in the given order in float64 and rounded to float32 once.

    The states share one manifest and the weights are not all zero. One state alone comes back exactly, and several
    give the bits of `strategies.fedavg.FedAvg`, which does the same without holding them all at once.
    """
    total = math.fsum(weights)
    mean = np.empty_like(states[0].buffer)
    for start in range(0, mean.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        accumulator = np.zeros(mean[block].size, dtype=np.float64)
        for weight, state in zip(weights, states, strict=True):
            accumulator += state.buffer[block].astype(np.float64) * weight
        mean[block] = accumulator / total
    return TrainableState(states[0].manifest, mean)
