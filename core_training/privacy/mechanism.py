"""The mechanism of record level as a recipe asks for it: how often a unit is drawn, and with how much noise.

Each step draws every unit by itself (Poisson), so a batch has as many as it happens to have. Pure arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from core_training.privacy.accounting import Release, noise_multiplier_for
from core_training.recipe.differential_privacy import DifferentialPrivacy
from core_training.recipe.schema import Recipe


@dataclass(frozen=True)
class RecordMechanism:
    """The steps of a run of record level at a site with so many units to train on (`units`).

    `batch` is the number of units that a step draws on average, `steps` the optimizer steps of the whole run.
    """

    terms: DifferentialPrivacy
    units: int
    batch: int
    steps: int

    @classmethod
    def of(cls, recipe: Recipe, units: int) -> RecordMechanism | None:
        """The recipe's; None where it asks for none."""
        terms, training = recipe.privacy.differential_privacy, recipe.training
        if terms is None:
            return None
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        steps = recipe.total_steps or math.ceil(training.num_train_epochs * max(1, units) / min(batch, max(1, units)))
        return cls(terms, units, batch, steps)

    @property
    def sampling_rate(self) -> float:
        """The probability with which a unit is drawn for a step."""
        return min(1.0, self.batch / self.units) if self.units else 1.0

    @property
    def noise_multiplier(self) -> float:
        """The standard deviation of a step's noise, in clips.

        Raises InputError where it follows from an ε and dp-accounting is not installed, or no noise is enough.
        """
        if self.terms.noise_multiplier is not None:
            return self.terms.noise_multiplier
        assert self.terms.epsilon is not None, "one of the two is given"
        return noise_multiplier_for(self.terms.epsilon, self.terms.delta, self.sampling_rate, self.steps)

    def release(self, steps: int) -> Release:
        """What so many steps release about one unit."""
        return Release(self.terms.unit, self.sampling_rate, self.noise_multiplier, steps)

    @property
    def run(self) -> Release:
        """What the whole run releases."""
        return self.release(self.steps)
