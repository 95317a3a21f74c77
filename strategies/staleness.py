"""Updates that began from an earlier state than the round's, as though they began from it. Pure.

Source: FedBuff, Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", 2022.
"""

from __future__ import annotations

import numpy as np

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from strategies.draws import PIECE


def share_of(recipe: Recipe, rounds: int) -> float:
    """The share of a change that counts, where so many rounds have passed since its start.

    Raises ProtocolError for more than `topology.most_stale`.
    """
    topology = recipe.topology
    if rounds > topology.most_stale:
        raise ProtocolError(
            f"{rounds} rounds have passed since the start of its update, and topology.most_stale is "
            f"{topology.most_stale}: it is left out"
        )
    return float((1 + rounds) ** -topology.stale_power)


def moved(trained: TrainableState, start: TrainableState, now: TrainableState, share: float) -> TrainableState:
    """`now` with a share of the change from `start` to `trained`, summed in float64."""
    state = TrainableState(now.manifest, np.empty(now.manifest.size, dtype=np.float32))
    for first in range(0, now.manifest.size, PIECE):
        piece = slice(first, first + PIECE)
        change = trained.buffer[piece].astype(np.float64) - start.buffer[piece]
        state.buffer[piece] = now.buffer[piece] + share * change
    return state
