"""What a run came to at its sites, as its summary tells it: computed from what the sites announced. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core_training.foundation.errors import InputError
from core_training.privacy.accounting import ACCOUNTANT, ADJACENCY, epsilon_of
from core_training.privacy.mechanism import RecordMechanism
from core_training.recipe.schema import Recipe

ASSUMPTIONS = (
    "the number of units is taken as known, and so are the times at which a site answers",
    "nobody is told which units a step drew, by chance (Poisson); an empty batch adds noise all the same",
    "noise is of double precision; what its last bits tell is not hidden",
    "losses, held-out figures and checkpoints that stay in a site's folders are not covered: do not publish them",
)


def run_account(recipe: Recipe, taken: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Any] | None, dict[str, float]]:
    """A run's account, and each site's ε, from each site's number of units and of optimizer steps.

    The account is that of the site with the largest ε; None without differential privacy. Its `epsilon` is None where
    dp-accounting is not installed.
    """
    terms = recipe.privacy.differential_privacy
    if terms is None:
        return None, {}
    epsilons: dict[str, float] = {}
    noise: dict[str, float] = {}
    for site, (units, steps) in taken.items():
        mechanism = RecordMechanism.of(recipe, units)
        assert mechanism is not None, "the recipe asks for it"
        try:
            noise[site] = mechanism.noise_multiplier
            epsilons[site] = epsilon_of([mechanism.release(steps)], terms.delta)
        except InputError:  # no accountant here: the sites keep accounts of their own
            continue
    worst = max(epsilons, key=lambda site: epsilons[site], default=None)
    account = {
        "level": "record",
        "unit": terms.unit,
        "epsilon": None if worst is None else epsilons[worst],
        "delta": terms.delta,
        "noise_multiplier": None if worst is None else noise[worst],
        "clip": terms.clip,
        "mechanism": "Gaussian noise on the sum of the units' clipped gradients, drawn by chance (DP-SGD)",
        "adjacency": ADJACENCY,
        "accountant": ACCOUNTANT,
        "losses_told": terms.tell_losses,
    }
    return account, epsilons
