"""Figures of an evaluation as whole numbers that can be added over sites, masked or not, and read back from the sum.

Every figure is a function of sums over items, so a federation's figures are those functions of the sites' sums. All is
in steps: sums over items of 2^-20, in which counts are exact and losses within 1e-6; sums over resampled items of 2^-6,
as they are only for intervals. Pure: no files, no network, no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from core_training.foundation.errors import InputError
from evaluation.figures.metrics import BINS, METRICS, Figure, Part, confusion, macro_f1, metric
from evaluation.figures.statistics import Array, Sums, interval_of
from evaluation.items import Answers, Item

STEP = 2.0**-20
RESAMPLED_STEP = 2.0**-6
MOST_RESAMPLES = 2000
MOST_LABELS = 64
MACRO_F1 = "macro_f1"
OFFERED = tuple(name for name, one in METRICS.items() if one.part is not Part.RUBRIC)
"""The metrics that a site can compute by itself, of its own records."""

_LARGEST = 2.0**62
_AT_ONCE = 4 * 10**6
"""Weights that are drawn at once."""

Whole = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """What every site of a federated evaluation computes alike.

    `labels` are those of the choices, in the table's order: with them there is a confusion table, and macro_f1 can be
    asked for. `own` says that each site's own model is compared with the common one.
    """

    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    resamples: int = 500
    own: bool = False

    def __post_init__(self) -> None:
        """Raise InputError for what no site could compute, or would."""
        if not self.metrics:
            raise InputError("metrics: an evaluation needs one at least")
        for name in self.metrics:
            check_offered(name)
        for what, names in (("metrics", self.metrics), ("labels", self.labels)):
            if len(set(names)) < len(names):
                raise InputError(f"{what}: one is named twice")
        if MACRO_F1 in self.metrics and not self.labels:
            raise InputError("metrics: macro_f1 needs the labels that all sites' choices have; name them with --labels")
        if len(self.labels) > MOST_LABELS or not 0 <= self.resamples <= MOST_RESAMPLES:
            raise InputError(f"an evaluation has {MOST_LABELS} labels and {MOST_RESAMPLES} resamples at most")

    @property
    def length(self) -> int:
        """How many whole numbers a site sends."""
        parts = sum(self.parts(name) for name in self.metrics)
        own = len(self.metrics) if self.own else 0
        return 1 + len(self.metrics) + parts + len(self.labels) ** 2 + own + self.resamples * parts

    def parts(self, name: str) -> int:
        """How many sums a metric is a function of."""
        return int(self.function(name).values.shape[1])

    def function(self, name: str) -> Sums:
        """The metric's sums over no items: how it is computed of sums over some."""
        return self.sums(name, (), Answers())[1]

    def sums(self, name: str, items: Sequence[Item], answers: Answers) -> Figure:
        """The metric's sums over a site's items."""
        return macro_f1(items, answers, self.labels) if name == MACRO_F1 else metric(name).of(items, answers)


def check_offered(name: str) -> None:
    """Raise InputError for a metric that sites do not compute for others, with the reason."""
    if name in OFFERED:
        return
    if name in METRICS or name == "reward":
        raise InputError(f"metrics: {name} is judged by another model, which the sites do not have")
    if name.startswith("regex:"):
        raise InputError("metrics: a pattern from outside would search the sites' answers for whatever it names")
    if ":" in name:
        raise InputError(f"metrics: '{name}' is code of yours, and no site runs anybody else's; name a built-in metric")
    metric(name)
    raise AssertionError(f"{name} is a metric")


@dataclass(frozen=True)
class SiteFigures:
    """Sums over one site's items, or over those of several sites. All arrays are in items' units, not in steps.

    `items` are how many there are, `counted[name]` how many a metric is over, `sums[name]` its parts (parts,), and
    `resampled[name]` the same of each resample (resamples, parts). `confusion` has right labels as rows, chosen ones as
    columns. `gains[name]` is the sum over
    the sites of how far their own model is above the common one; a site without one uses the common one, so it adds 0.
    """

    items: int
    counted: Mapping[str, int]
    sums: Mapping[str, Array]
    resampled: Mapping[str, Array]
    confusion: Whole
    gains: Mapping[str, float] = field(default_factory=dict)


def figures_of(
    plan: Plan,
    items: Sequence[Item],
    answers: Answers,
    seed: bytes,
    own: Answers | None = None,
) -> SiteFigures:
    """One site's figures; `own` are the answers of the site's own model, where it has one.

    `seed` decides the resamples' weights. Whoever knew them, and saw the sums, could solve them for each item: so it is
    made of a secret of the site's. Raises InputError where the items do not fit the plan.
    """
    found = {name: plan.sums(name, items, answers) for name in plan.metrics}
    for name, (ids, _) in found.items():
        if not ids:
            raise _unfit(f"metrics: nothing here is what {name} is of")
    places = {item.id: place for place, item in enumerate(items)}
    rows = {name: np.array([places[one] for one in ids], dtype=np.int64) for name, (ids, _) in found.items()}
    gains = dict.fromkeys(plan.metrics, 0.0) if plan.own else {}
    if plan.own and own is not None:
        gains = {name: plan.sums(name, items, own)[1].value - sums.value for name, (_, sums) in found.items()}
    return SiteFigures(
        len(items),
        {name: len(sums) for name, (_, sums) in found.items()},
        {name: sums.values.sum(axis=0) for name, (_, sums) in found.items()},
        _resampled(plan, {name: sums.values for name, (_, sums) in found.items()}, rows, len(items), seed),
        _confusion(plan.labels, items, answers),
        gains,
    )


def _resampled(
    plan: Plan, values: Mapping[str, Array], rows: Mapping[str, Whole], items: int, seed: bytes
) -> dict[str, Array]:
    """The sums of resamples in which each item counts so often as a Poisson draw of mean 1 says.

    Items are drawn one by one, so sites draw by themselves, and their sums are a resample of all sites' items
    (Chamandy, Muralidharan, Najmi and Naidu 2012, "Estimating uncertainty for massive data streams").
    """
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(seed).digest()))
    found: dict[str, list[Array]] = {name: [] for name in plan.metrics}
    at_once = max(1, _AT_ONCE // max(items, 1))
    for first in range(0, plan.resamples, at_once):
        weights = random.poisson(1.0, size=(min(at_once, plan.resamples - first), items)).astype(np.float64)
        for name in plan.metrics:
            found[name].append(weights[:, rows[name]] @ values[name])
    return {name: np.concatenate(parts) if parts else np.zeros((0, plan.parts(name))) for name, parts in found.items()}


def _unfit(said: str) -> InputError:
    """An error that whoever asked is told: it says no more of the items than that they do not fit."""
    return InputError(said, public=said)


def _confusion(labels: Sequence[str], items: Sequence[Item], answers: Answers) -> Whole:
    table = np.zeros((len(labels), len(labels)), dtype=np.int64)
    if labels and answers.scored:
        own, counts = confusion(items, answers)
        if set(own) - set(labels):
            raise _unfit(f"labels: the choices here have others than {', '.join(labels)}")
        places = [labels.index(label) for label in own]
        table[np.ix_(places, places)] = counts
    return table


def to_integers(plan: Plan, figures: SiteFigures) -> list[int]:
    """Whole numbers whose sums over sites read back as sums (`from_integers`): `plan.length` of them."""
    numbers = [figures.items, *(figures.counted[name] for name in plan.metrics)]
    for name in plan.metrics:
        numbers += _steps(figures.sums[name], STEP)
    numbers += figures.confusion.ravel().tolist()
    if plan.own:
        numbers += _steps(np.array([figures.gains[name] for name in plan.metrics]), STEP)
    for name in plan.metrics:
        numbers += _steps(figures.resampled[name].ravel(), RESAMPLED_STEP)
    return numbers


def from_integers(plan: Plan, numbers: Sequence[int]) -> SiteFigures:
    """Read `to_integers`, or a sum of several sites'. There are `plan.length` numbers."""
    left = np.array(numbers, dtype=np.int64)

    def take(count: int) -> Whole:
        nonlocal left
        taken, left = left[:count], left[count:]
        return taken

    items = int(take(1)[0])
    counted = {name: int(take(1)[0]) for name in plan.metrics}
    sums = {name: _from_steps(take(plan.parts(name)), STEP) for name in plan.metrics}
    table = take(len(plan.labels) ** 2).reshape(len(plan.labels), len(plan.labels))
    gains: dict[str, float] = {}
    if plan.own:
        gains = dict(zip(plan.metrics, (take(len(plan.metrics)) * STEP).tolist(), strict=True))
    resampled = {
        name: _from_steps(take(plan.resamples * (parts := plan.parts(name))), RESAMPLED_STEP).reshape(-1, parts)
        for name in plan.metrics
    }
    return SiteFigures(items, counted, sums, resampled, table, gains)


def is_possible(plan: Plan, numbers: Sequence[int]) -> bool:
    """Whether numbers may be one site's: its items are some, no count is beyond them, no share beyond its count."""
    figures = from_integers(plan, numbers)
    counts = [*figures.counted.values(), int(figures.confusion.sum())]
    if figures.items < 1 or not all(0 <= count <= figures.items for count in counts) or (figures.confusion < 0).any():
        return False
    shares = [name for name in plan.metrics if plan.function(name).is_share]
    return all(0 <= figures.sums[name][0] <= figures.counted[name] == figures.sums[name][1] for name in shares)


def _steps(values: Array, step: float) -> list[int]:
    """Values in whole steps. Raises InputError for one that is no number, or too large to be added up."""
    whole = np.rint(np.asarray(values, dtype=np.float64) / step)
    if not np.isfinite(whole).all() or (np.abs(whole) > _LARGEST / 2**15).any():
        raise InputError("a figure is no finite number, or too large to be added up")
    return [int(value) for value in whole.tolist()]


def _from_steps(whole: Whole, step: float) -> Array:
    return np.asarray(whole * step, dtype=np.float64)


def told(plan: Plan, figures: SiteFigures) -> dict[str, dict[str, Any]]:
    """Each metric's value with its 95 % interval, as `results.json` has them."""
    return {name: _told(plan.function(name), name, figures) for name in plan.metrics if figures.counted[name]}


def _told(function: Sums, name: str, figures: SiteFigures) -> dict[str, Any]:
    with np.errstate(all="ignore"):
        value = float(function.of(figures.sums[name]))
        drawn = np.asarray(function.of(figures.resampled[name]), dtype=np.float64)
    drawn = drawn if function.has_interval else drawn[:0]
    found = interval_of(value, drawn, figures.counted[name], is_share=function.is_share)
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def value_of(plan: Plan, figures: SiteFigures, name: str) -> float:
    """A metric's value; NaN over nothing."""
    if not figures.counted[name]:
        return math.nan
    with np.errstate(all="ignore"):
        return float(plan.function(name).of(figures.sums[name]))


def tables(plan: Plan, figures: SiteFigures) -> dict[str, Any]:
    """The confusion table and the bins of calibration, where the plan has them, as `results.json` has them."""
    document: dict[str, Any] = {}
    if plan.labels:
        document["confusion"] = {
            "labels": list(plan.labels),
            "rows": "right",
            "columns": "chosen",
            "counts": figures.confusion.tolist(),
        }
    if "ece" in plan.metrics:
        bins = figures.sums["ece"].reshape(3, BINS).T.tolist()
        document["calibration"] = [
            {
                "low": number / BINS,
                "high": (number + 1) / BINS,
                "n": int(n),
                "confidence": sure / n,
                "accuracy": correct / n,
            }
            for number, (n, sure, correct) in enumerate(bins)
            if n
        ]
    return document


def is_worse(name: str) -> Callable[[float, float], bool]:
    """Whether the first of two values of a metric is the worse one."""
    return (lambda a, b: a > b) if METRICS[name].higher_is_better is False else (lambda a, b: a < b)
