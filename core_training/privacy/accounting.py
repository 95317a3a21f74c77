"""What releases come to together: ε for a δ, by privacy loss distributions (Koskela 2020; dp-accounting computes them).

Two data sets are neighbours where one has one unit more (add or remove). Pure, but for the library it loads.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from core_training.foundation.errors import InputError

ADJACENCY = "add or remove one unit"
ACCOUNTANT = "privacy loss distributions (dp-accounting)"

_NO_PRIVACY = 200.0
"""Beyond it the bound will do: distributions of such losses take more memory than there is."""
_HALVINGS = 6
_COARSE = 1e-3
_LEAST_NOISE, _MOST_NOISE = 0.1, 1e4
_ORDERS = (*range(2, 64), 128, 256, 512)
"""Of Rényi's divergence: whole ones have a closed form."""


@dataclass(frozen=True)
class Release:
    """So many `steps` of the Gaussian mechanism, each on units that were drawn with probability `sampling_rate`.

    `noise_multiplier` is the noise's standard deviation over the most that one unit can add.
    """

    unit: str
    sampling_rate: float
    noise_multiplier: float
    steps: int


def epsilon_of(releases: Iterable[Release], delta: float) -> float:
    """The ε, at this δ, of releases about units of one kind, all of them together; 0.0 for none.

    Raises InputError where dp-accounting is not installed.
    """
    steps: dict[tuple[float, float], int] = {}
    for one in releases:
        key = (one.sampling_rate, one.noise_multiplier)
        steps[key] = steps.get(key, 0) + one.steps
    return _epsilon(tuple(sorted((*key, count) for key, count in steps.items() if count)), delta)


@lru_cache(maxsize=256)
def _epsilon(steps: tuple[tuple[float, float, int], ...], delta: float, interval: float = 1e-4) -> float:
    """By losses rounded up to multiples of `interval`: a coarser one takes less time and says more than it is."""
    if not steps:
        return 0.0
    if (bound := _by_moments(steps, delta)) > _NO_PRIVACY:
        return bound
    return _composed(_library("pld").PLDAccountant(value_discretization_interval=interval), steps, delta)


def _by_moments(steps: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """An upper bound of ε, by Rényi's moments (Mironov 2017)."""
    return _composed(_library("rdp").RdpAccountant(_ORDERS), steps, delta)


def _composed(accountant: Any, steps: Iterable[tuple[float, float, int]], delta: float) -> float:
    events = _library()
    for rate, noise, count in steps:
        gaussian = events.GaussianDpEvent(noise)
        accountant.compose(events.PoissonSampledDpEvent(rate, gaussian) if rate < 1 else gaussian, count)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=64)
def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The least noise, to a percent, with which so many steps come to no more than `epsilon`.

    Raises InputError where none is enough, or dp-accounting is not installed.
    """

    # Rényi's moments take milliseconds and say more than it is: they tell where to look.
    above = _LEAST_NOISE
    while _by_moments(((sampling_rate, above, steps),), delta) > epsilon:
        if (above := above * 1.25) > _MOST_NOISE:
            raise InputError(
                f"privacy.differential_privacy.epsilon: no noise makes {steps} steps come to {epsilon:g} at delta "
                f"{delta:g}; give a larger epsilon, or fewer steps"
            )
    below = above * 0.75
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        if _epsilon(((sampling_rate, middle, steps),), delta, _COARSE) <= epsilon:
            above = middle
        else:
            below = middle
    return above


def _library(part: str = "") -> Any:
    try:
        return importlib.import_module(f"dp_accounting{'.' * bool(part)}{part}")
    except ImportError:
        raise InputError(
            "privacy.differential_privacy: what a run comes to is computed by dp-accounting, which is not installed: "
            "pip install 'fedloom[privacy]'"
        ) from None
