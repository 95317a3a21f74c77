"""Ratings from pairwise wins: the model of Bradley and Terry by Newton's method, with intervals over items. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluation.figures.statistics import Array, Interval, Sums, interval

POINTS = 400 / np.log(10)
"""Points of rating to a unit of log-strength: 400 points are odds of ten to one (Elo)."""
MIDDLE = 1000.0
"""The mean rating of all models."""
_PRIOR = 0.5
"""Wins each way that every pair is given beside its own where strengths would be infinite (Haldane, Anscombe 1956)."""
_STEPS = 60
_CLOSE = 1e-10


@dataclass(frozen=True)
class Ratings:
    """Each model's rating with its interval; `is_bounded` says that wins alone would have made strengths infinite."""

    intervals: tuple[Interval, ...]
    is_bounded: bool


def log_strengths(wins: Array) -> Array:
    """The log-strengths θ with P(i beats j) = 1 / (1 + exp(θⱼ − θᵢ)), shape (…, models), of mean 0.

    `wins` has shape (…, models, models): [i, j] is how often i beat j, a tie being half a win for both. The likelihood
    (Bradley and Terry, Biometrika 1952) is largest at finite strengths just where no group of models wins, or loses,
    all against the others (Ford 1957). Elsewhere each pair is given half a win each way more.
    """
    wins = np.asarray(wins, dtype=np.float64)
    shape, models = wins.shape[:-2], wins.shape[-1]
    flat = wins.reshape(-1, models, models) * (1 - np.eye(models))
    flat = flat + (~is_finite(flat))[:, None, None] * _PRIOR * (1 - np.eye(models))
    games = flat + flat.transpose(0, 2, 1)
    won = flat.sum(axis=2)
    theta = np.zeros((len(flat), models))
    value = _likelihood(theta, flat)
    for _ in range(_STEPS):
        expected = games / (1 + np.exp(theta[:, None, :] - theta[:, :, None]))
        gradient = won - expected.sum(axis=2)
        spread = expected * (1 - expected / np.where(games > 0, games, 1.0))
        # The curvature is that of a graph: adding 1 everywhere holds the mean and makes it invertible.
        curvature = spread.sum(axis=2)[:, :, None] * np.eye(models) - spread + 1.0
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        theta, value, moved = _climbed(theta, step, value, flat)
        if moved < _CLOSE:
            break
    return np.asarray((theta - theta.mean(axis=1, keepdims=True)).reshape(*shape, models))


def _climbed(theta: Array, step: Array, value: Array, wins: Array) -> tuple[Array, Array, float]:
    """A step of Newton's, halved where the likelihood would fall: far from its top it overshoots."""
    size = np.ones((len(theta), 1))
    for _ in range(30):
        found = _likelihood(theta + size * step, wins)
        falls = found < value - 1e-9 * np.maximum(1.0, np.abs(value))
        if not falls.any():
            break
        size[falls] /= 2
    moved = size * step
    return theta + moved, _likelihood(theta + moved, wins), float(np.abs(moved).max(initial=0.0))


def _likelihood(theta: Array, wins: Array) -> Array:
    """The log-likelihood of each set of wins, shape (sets,)."""
    gaps = theta[:, :, None] - theta[:, None, :]
    return np.asarray(-(wins * np.logaddexp(0.0, -gaps)).sum(axis=(1, 2)))


def is_finite(wins: Array) -> npt.NDArray[np.bool_]:
    """Whether each set of wins, shape (sets, models, models), has finite strengths: each model beats each, by way of
    others at least."""
    reached = wins + np.eye(wins.shape[-1]) > 0
    for _ in range(max(1, int(np.ceil(np.log2(wins.shape[-1]))))):
        reached = (reached.astype(np.float64) @ reached.astype(np.float64)) > 0
    return np.asarray(reached.all(axis=(1, 2)))


def ratings(wins: Array, resamples: int = 1000, seed: int = 0) -> Ratings:
    """Ratings from the wins in each item, shape (items, models, models), with bootstrap intervals over the items.

    Items without a judged pair are to be left out. All are NaN where there is none. Where strengths would be infinite,
    resampling sees no spread: the interval is then that of the curvature, with half a win each way in it.
    """
    items, models = wins.shape[:2]
    if not items:
        return Ratings((Interval(np.nan, np.nan, np.nan, 0),) * models, is_bounded=False)
    flat = wins.reshape(items, models * models)
    found = []
    for number in range(models):

        def of(sums: Array, number: int = number) -> Array:
            strengths = log_strengths(sums.reshape(*sums.shape[:-1], models, models))
            return np.asarray(MIDDLE + POINTS * strengths[..., number])

        found.append(interval(Sums(flat, of), resamples=resamples, seed=seed))
    whole = wins.sum(axis=0) * (1 - np.eye(models))
    if is_finite(whole[None])[0]:
        return Ratings(tuple(found), is_bounded=False)
    errors = 1.96 * POINTS * _standard_errors(whole + _PRIOR * (1 - np.eye(models)))
    far = zip(found, errors.tolist(), strict=True)
    return Ratings(tuple(Interval(one.value, one.value - e, one.value + e, one.n) for one, e in far), is_bounded=True)


def _standard_errors(wins: Array) -> Array:
    """Of log-strengths of mean 0, shape (models,): the diagonal of the inverse of the information."""
    theta = log_strengths(wins)
    expected = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
    spread = (wins + wins.T) * expected * (1 - expected)
    information = spread.sum(axis=1) * np.eye(len(theta)) - spread
    return np.asarray(np.sqrt(np.diag(np.linalg.pinv(information, hermitian=True))))
