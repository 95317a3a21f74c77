"""The mechanisms as a recipe asks for them: how often a unit is drawn, and with how much noise. Pure arithmetic.

Of records, each step draws every unit by itself (Poisson), so a batch has as many as it happens to have. Of sites, all
take part in each round: who they are is known, so drawing some of them hides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from core_training.privacy.accounting import Release, noise_multiplier_for
from core_training.recipe.differential_privacy import EACH_SITE, DifferentialPrivacy
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
        if terms is None or terms.of_sites:
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
        return _noise_of(self.terms, self.sampling_rate, self.steps)

    def release(self, steps: int) -> Release:
        """What so many steps release about one unit."""
        return Release(self.terms.hidden, self.sampling_rate, self.noise_multiplier, steps)

    @property
    def run(self) -> Release:
        """What the whole run releases."""
        return self.release(self.steps)


@dataclass(frozen=True)
class SiteMechanism:
    """The rounds of a run of level site: the sum of any `fewest` sites' clipped updates has all of the noise."""

    terms: DifferentialPrivacy
    fewest: int
    rounds: int
    local_steps: int

    @classmethod
    def of(cls, recipe: Recipe) -> SiteMechanism | None:
        """The recipe's; None where it asks for none."""
        terms, secure = recipe.privacy.differential_privacy, recipe.privacy.secure
        if terms is None or not terms.of_sites:
            return None
        assert secure is not None, "level site needs it"
        # What the sites themselves hold a server to, less one: each of them knows the noise of its own.
        return cls(terms, secure.minimum_sites - 1, recipe.topology.rounds or 1, recipe.topology.local_steps or 1)

    @property
    def noise_multiplier(self) -> float:
        """The standard deviation of the noise in a sum, in clips. Raises InputError: see `RecordMechanism`."""
        return _noise_of(self.terms, 1.0, self.rounds)

    @property
    def share(self) -> float:
        """The standard deviation of one site's noise, in clips: with it `fewest` of them have all."""
        return self.noise_multiplier / math.sqrt(self.fewest)

    def release(self, steps: int) -> Release:
        """What the rounds of so many optimizer steps release about one site."""
        return Release(EACH_SITE, 1.0, self.noise_multiplier, max(1, steps // self.local_steps))

    @property
    def run(self) -> Release:
        """What the whole run releases."""
        return self.release(self.rounds * self.local_steps)


def _noise_of(terms: DifferentialPrivacy, sampling_rate: float, steps: int) -> float:
    """The noise that is named or, where an ε is, the least that keeps so many steps within it."""
    if terms.noise_multiplier is not None:
        return terms.noise_multiplier
    assert terms.epsilon is not None, "one of the two is given"
    return noise_multiplier_for(terms.epsilon, terms.delta, sampling_rate, steps)


def mechanism_of(recipe: Recipe, units: int) -> RecordMechanism | SiteMechanism | None:
    """The recipe's mechanism at a site with so many units; None without differential privacy."""
    return RecordMechanism.of(recipe, units) or SiteMechanism.of(recipe)
