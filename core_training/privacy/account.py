"""What a run came to at its sites, as its summary tells it: computed from what the sites announced. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core_training.foundation.errors import InputError
from core_training.privacy.accounting import ACCOUNTANT, ADJACENCY, epsilon_of
from core_training.privacy.mechanism import mechanism_of
from core_training.recipe.differential_privacy import EACH_SITE
from core_training.recipe.schema import Recipe

_OF_RECORDS = "Gaussian noise on the sum of the units' clipped gradients, drawn by chance (DP-SGD)"
_OF_SITES = "discrete Gaussian noise on the sum of the sites' clipped updates, a share of it by each"

_ASSUMED = (
    "the times at which a site answers are taken as known",
    "losses, held-out figures and checkpoints that stay in a site's folders are not covered: do not publish them",
)
_ASSUMED_OF_RECORDS = (
    "the number of units is taken as known",
    "nobody is told which units a step drew, by chance (Poisson); an empty batch adds noise all the same",
    "noise is of double precision; what its last bits tell is not hidden",
)
_ASSUMED_OF_SITES = (
    "no sum of fewer sites than privacy.secure_aggregation.minimum_sites is opened, and none of them tells its noise",
    "who takes part is known",
)


def assumptions_of(unit: str) -> list[str]:
    """What the ε of releases about this unit rests on."""
    return [*(_ASSUMED_OF_SITES if unit == EACH_SITE else _ASSUMED_OF_RECORDS), *_ASSUMED]


def words_of(unit: str) -> str:
    """What hides this unit, in a line."""
    return _OF_SITES if unit == EACH_SITE else _OF_RECORDS


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
        mechanism = mechanism_of(recipe, units)
        assert mechanism is not None, "the recipe asks for it"
        try:
            noise[site] = mechanism.noise_multiplier
            epsilons[site] = epsilon_of([mechanism.release(steps)], terms.delta)
        except InputError:  # no accountant here: the sites keep accounts of their own
            continue
    worst = max(epsilons, key=lambda site: epsilons[site], default=None)
    account = {
        "level": terms.level,
        "unit": terms.hidden,
        "epsilon": None if worst is None else epsilons[worst],
        "delta": terms.delta,
        "noise_multiplier": None if worst is None else noise[worst],
        "clip": terms.clip,
        "mechanism": words_of(terms.hidden),
        "adjacency": ADJACENCY,
        "accountant": ACCOUNTANT,
        "losses_told": terms.tell_losses,
    }
    return account, epsilons
