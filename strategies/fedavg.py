"""Federated averaging (McMahan et al. 2017): the mean of the sites' states, weighted as `aggregation.weights` says: by
what entered their losses (tokens, pairs or examples, as the stage says), unless it says otherwise.

Updates are added as they arrive and are not kept, so memory does not grow with the number of sites. The sums are
float64: for one site the result is its state bit for bit, and the order of arrival does not show in float32.
"""

from __future__ import annotations

import math

import numpy as np

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.recipe.schema import Recipe

MOST_PROCESSES = 64
"""The largest DeepSpeed group that a site is taken to have."""


def most_weight(recipe: Recipe, steps: int, rows: int | None = None) -> int:
    """The most weight that `steps` optimizer steps can have: a larger one is an attempt to own the model.

    `rows` is the most that the site takes in a step; None for those of the largest group that a site may have.
    """
    training = recipe.training
    if rows is None:
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * MOST_PROCESSES
    tokens = recipe.rollout.max_new_tokens if recipe.stage_part.samples else training.max_length
    return rows * steps * units_of_a_row(recipe, tokens) * recipe.stage_part.passes(recipe.stage_settings)


def units_of_a_row(recipe: Recipe, tokens: int) -> int:
    """The most units of the stage's loss that one row can have, each sequence of it with up to so many tokens."""
    part = recipe.stage_part
    return (tokens if part.unit == "tokens" else 1) * part.answers(recipe.stage_settings)


def check_update(state: TrainableState, weight: float, manifest: Manifest) -> None:
    """Raise ProtocolError for an update that must not enter the result of any rule."""
    if state.manifest.digest != manifest.digest:
        raise ProtocolError("the state has another manifest than the run")
    if not (math.isfinite(weight) and weight > 0):
        raise ProtocolError(f"weight {weight} is not a positive number")
    if not state.is_finite():
        raise ProtocolError("the state holds NaN or infinite values")


class FedAvg:
    """One round's aggregation. It needs sums only, so it works under secure aggregation."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._sum = np.zeros(manifest.size, dtype=np.float64)
        self._total_weight = 0.0
        self.count = 0

    def add(self, state: TrainableState, weight: float) -> None:
        """Add one update. Raises ProtocolError, changing nothing, for what must not enter a mean."""
        check_update(state, weight, self.manifest)
        # Cut in pieces, so that the float64 product never doubles the memory of the sum.
        for start in range(0, self.manifest.size, 1 << 20):
            piece = slice(start, start + (1 << 20))
            self._sum[piece] += state.buffer[piece].astype(np.float64) * weight
        self._total_weight += weight
        self.count += 1

    def result(self) -> TrainableState:
        """The weighted mean of what was added (at least one update)."""
        mean = np.empty(self.manifest.size, dtype=np.float32)
        np.divide(self._sum, self._total_weight, out=mean, casting="same_kind")
        return TrainableState(self.manifest, mean)
