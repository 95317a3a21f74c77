"""Statistics of an evaluation: bootstrap intervals, exact McNemar, the paired bootstrap, Holm. No files, no clock.

Every figure is a function of sums over items (`Sums`), so a resampled figure is one product of matrices, and a
federation could add the sums up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RESAMPLES = 2000
_AT_ONCE = 4 * 10**6
"""Weights that are drawn at once."""


@dataclass(frozen=True)
class Sums:
    """A figure that is `of` sums over items: `values` has shape (items, parts), and `of` takes (…, parts) to (…).

    `is_share` says that each item gives 0 or 1 and the figure is their mean; `has_interval` is False for a figure so
    biased in few items that its bootstrap intervals do not hold what they say.
    """

    values: Array
    of: Callable[[Array], Array]
    is_share: bool = False
    has_interval: bool = True

    def __len__(self) -> int:
        return len(self.values)

    @property
    def value(self) -> float:
        """The figure over all items; NaN over none."""
        if not len(self):
            return math.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(self.of(self.values.sum(axis=0)))

    def only(self, chosen: npt.NDArray[Any]) -> Sums:
        """The figure over some of the items."""
        return Sums(self.values[chosen], self.of, self.is_share, self.has_interval)


def mean(values: Sequence[float], *, is_share: bool = False) -> Sums:
    """The mean of a number an item."""
    column = np.asarray(values, dtype=np.float64)
    return Sums(np.stack([column, np.ones_like(column)], axis=1), _ratio, is_share)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Sums:
    """A sum over another: a loss per token, where items have several tokens."""
    return Sums(np.stack([np.asarray(numerators, float), np.asarray(denominators, float)], axis=1), _ratio)


def _ratio(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / sums[..., 1])


@dataclass(frozen=True)
class Interval:
    """A figure with its interval; both ends are NaN where it has none, or fewer than two items leave nothing to say."""

    value: float
    low: float
    high: float
    n: int


def interval(sums: Sums, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The figure with a bootstrap interval over items.

    Expanded percentiles: the percentile interval is too narrow for few items by the factor between the normal and
    Student's t with n in the place of n − 1 (Hesterberg, The American Statistician 2015, section 5.2). Where all items
    are right, or all wrong, resampling sees no spread: the end is then Clopper and Pearson's (Biometrika 1934).
    """
    n, value = len(sums), sums.value
    if not sums.has_interval:
        return Interval(value, math.nan, math.nan, n)
    if n < 2 or (sums.is_share and value in (0.0, 1.0)):
        return interval_of(value, np.zeros(0), n, level, is_share=sums.is_share)
    return interval_of(value, _resampled(sums, resamples, seed), n, level, is_share=sums.is_share)


def interval_of(value: float, drawn: Array, n: int, level: float = 0.95, *, is_share: bool = False) -> Interval:
    """The interval of a figure over n items, from its values in resamples of them: see `interval`."""
    if n < 2:
        return Interval(value, math.nan, math.nan, n)
    if is_share and value in (0.0, 1.0):
        far = 1 - ((1 - level) / 2) ** (1 / n)
        low, high = (0.0, far) if value == 0 else (1 - far, 1.0)
        return Interval(value, low, high, n)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, math.nan, math.nan, n)
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_t(1 - (1 - level) / 2, n - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
    return Interval(value, low, high, n)


def _resampled(sums: Sums, resamples: int, seed: int) -> Array:
    """The figure in each of so many resamples of the items, shape (resamples,). One seed draws the same items."""
    n, random = len(sums), np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // n)
    drawn = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        items = random.integers(0, n, size=(count, n)) + n * np.arange(count)[:, None]
        weights = np.bincount(items.ravel(), minlength=count * n).reshape(count, n).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn.append(sums.of(weights @ sums.values))
    return np.concatenate(drawn)


def student_t(probability: float, degrees: int) -> float:
    """A quantile of Student's t, above 1/2: exact for 1 and 2 degrees, else by Newton on the distribution function."""
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    at = NormalDist().inv_cdf(probability)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    for _ in range(50):
        density = math.exp(log_scale - (degrees + 1) / 2 * math.log1p(at * at / degrees))
        step = (_student_cdf(at, degrees) - probability) / density
        at -= step
        if abs(step) < 1e-12 * max(1.0, abs(at)):
            break
    return at


def _student_cdf(at: float, degrees: int) -> float:
    """The distribution function for whole degrees, as a finite series (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    if degrees > 1000:  # by then it is the normal one but for terms in 1 / degrees²
        z = at * (1 - 1 / (4 * degrees)) / math.sqrt(1 + at * at / (2 * degrees))
        return NormalDist().cdf(z)
    angle = math.atan2(at, math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    if odd:
        inside = 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))
    else:
        inside = math.sin(angle) * total
    return 0.5 + inside / 2


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """The two-sided p of the exact McNemar test: of the items that one alone has right, each has them by a coin's toss.

    Raises ValueError for lists of different lengths.
    """
    only_ours = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    n, few = only_ours + only_theirs, min(only_ours, only_theirs)
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


@dataclass(frozen=True)
class Difference:
    """A figure minus another of the same items, with its interval and p."""

    value: float
    low: float
    high: float
    p: float
    n: int
    method: str


def difference(ours: Sums, theirs: Sums, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """One figure minus the other, of the same items in the same order.

    The interval is the paired bootstrap's (both are resampled alike). p is McNemar's for shares; else the share of
    resampled differences at least as far from the difference as 0 is (Efron and Tibshirani 1993, chapter 16, by shift).
    """
    value, n = ours.value - theirs.value, len(ours)
    if n < 2 or not (ours.has_interval and theirs.has_interval):
        return Difference(value, math.nan, math.nan, math.nan, n, "none")
    drawn = _resampled(ours, resamples, seed) - _resampled(theirs, resamples, seed)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Difference(value, math.nan, math.nan, math.nan, n, "none")
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_t(1 - (1 - level) / 2, n - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
    if ours.is_share and theirs.is_share:
        p = mcnemar([v > 0 for v in ours.values[:, 0]], [v > 0 for v in theirs.values[:, 0]])
        return Difference(value, low, high, p, n, "mcnemar")
    # A difference of rounding alone is none.
    as_far = np.abs(drawn - value) >= abs(value) * (1 - 1e-9)
    p = 1.0 if value == 0 else float((1 + as_far.sum()) / (1 + len(drawn)))
    return Difference(value, low, high, p, n, "paired bootstrap")


def holm(ps: Sequence[float]) -> list[float]:
    """The p values adjusted for their number (Holm, Scandinavian Journal of Statistics 1979), in the order given."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted
