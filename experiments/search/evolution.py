"""CMA-ES over the keys that are numbers beside all others' values, as a sampler of Optuna's.

The distribution is made anew for each proposal, by telling `cmaes` of the trials so far in the order of the search: so
nothing is kept of it, and a journal holds numbers alone (Optuna's own sampler keeps a pickle in it).
Source: Hansen, "The CMA Evolution Strategy: A Tutorial", 2016.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cmaes import CMA
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from experiments.search.space import SearchedKey

_FIRST_SPREAD = 1 / 6
"""Standard deviation at the start, in ranges of a key."""


class Evolution(BaseSampler):  # type: ignore[misc]
    """Proposes the trial of this place in the search, from `before`: those with earlier places, in their order.

    The first `startup` trials are drawn at random, and the distribution begins at the best of them. One that did not
    come to its end counts as the worst of its generation.
    """

    def __init__(
        self, keys: Sequence[SearchedKey], place: int, before: Sequence[FrozenTrial], startup: int, seed: int
    ) -> None:
        self._keys = [key for key in keys if key.kind != "categorical" and not key.when]
        self._place = place
        self._before = before
        self._startup = startup
        self._seed = seed
        self._random = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        # One number by itself has no covariance.
        return {key.name: _distribution(key) for key in self._keys} if len(self._keys) > 1 else {}

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        first = self._best_of_the_first(study.direction)
        if not search_space or self._place < self._startup or first is None:
            return {}
        bounds = np.array([[0.0, 1.0]] * len(self._keys))
        evolution = CMA(mean=first, sigma=_FIRST_SPREAD, bounds=bounds, seed=self._seed)
        size = evolution.population_size
        ended = [one for one in self._before[self._startup :] if one.state.is_finished()]
        for start in range(0, len(ended) - size + 1, size):
            evolution.tell(self._generation(ended[start : start + size], study.direction))
        return {key.name: _value(key, share) for key, share in zip(self._keys, evolution.ask(), strict=True)}

    def sample_independent(self, study: Any, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return self._random.sample_independent(study, trial, name, distribution)

    def _best_of_the_first(self, direction: StudyDirection) -> Any:
        complete = [one for one in self._before[: self._startup] if one.state == TrialState.COMPLETE]
        if not complete:
            return None
        return self._shares(min(complete, key=lambda one: _loss(one, direction)))

    def _generation(self, trials: Sequence[FrozenTrial], direction: StudyDirection) -> list[tuple[Any, float]]:
        losses = [_loss(one, direction) for one in trials]
        worst = max((loss for loss in losses if math.isfinite(loss)), default=0.0)
        return [
            (self._shares(one), loss if math.isfinite(loss) else worst)
            for one, loss in zip(trials, losses, strict=True)
        ]

    def _shares(self, trial: FrozenTrial) -> Any:
        return np.array([_share(key, trial.params[key.name]) for key in self._keys])


def _loss(trial: FrozenTrial, direction: StudyDirection) -> float:
    if trial.state != TrialState.COMPLETE or trial.value is None:
        return math.inf
    return float(trial.value if direction == StudyDirection.MINIMIZE else -trial.value)


def _distribution(key: SearchedKey) -> BaseDistribution:
    """As `Trial.suggest_int` and `suggest_float` name it."""
    if key.kind == "int":
        step = 1 if key.log or key.step is None else int(key.step)
        return IntDistribution(int(key.low), int(key.high), log=key.log, step=step)
    return FloatDistribution(key.low, key.high, log=key.log, step=key.step)


def _share(key: SearchedKey, value: float) -> float:
    """How far a value is from `low` to `high`."""
    if key.log:
        return math.log(value / key.low) / math.log(key.high / key.low)
    return (value - key.low) / (key.high - key.low)


def _value(key: SearchedKey, share: float) -> int | float:
    if key.log:
        value = key.low * (key.high / key.low) ** share
    else:
        value = key.low + share * (key.high - key.low)
        if key.step is not None:
            value = key.low + round((value - key.low) / key.step) * key.step
    return key.number(min(max(value, key.low), key.high))
