"""The rules that look at each update by itself, against plain NumPy on whole matrices."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.parts.aggregation_rules import AGGREGATION_RULES
from core_training.recipe.sections.aggregation import Aggregation
from strategies.aggregation_rule import AggregationRule
from strategies.draws import PIECE

SIZE = PIECE + 77
MANIFEST = Manifest.of({"a": (SIZE,)})
RULES = [name for name, part in AGGREGATION_RULES.items() if str(part.target).startswith("strategies.robust_rules.")]
Matrix = np.ndarray[Any, Any]


def state_of(values: Any, manifest: Manifest = MANIFEST) -> TrainableState:
    return TrainableState(manifest, np.array(values, dtype=np.float32))


def start() -> Matrix:
    return np.random.default_rng(0).normal(size=SIZE).astype(np.float32).astype(np.float64)


def sent(count: int, poisoned: int = 0) -> Matrix:
    """A row for each site: changes in one direction, with noise; the last ones ten times the other way."""
    random = np.random.default_rng(count)
    changes = random.normal(size=SIZE) + 0.3 * random.normal(size=(count, SIZE))
    changes[count - poisoned :] *= -10
    return (start() + 0.1 * changes).astype(np.float32).astype(np.float64)


def weights_of(count: int) -> Matrix:
    return np.random.default_rng(9).integers(1, 50, count).astype(np.float64)


def made(name: str, settings: dict[str, Any], manifest: Manifest = MANIFEST, first: Any = None) -> AggregationRule:
    wanted = Aggregation(**{"rule": name, **({name: settings} if settings else {})})
    given = (manifest, state_of(start() if first is None else first, manifest))
    rule: AggregationRule = wanted.rule_part.make(wanted, *given[: 1 + wanted.rule_part.needs_start])
    return rule


def result_of(
    name: str, rows: Matrix, weights: Sequence[float] | Matrix, order: Any = None, **settings: Any
) -> TrainableState:
    rule = made(name, settings)
    for place in range(len(rows)) if order is None else order:
        rule.add(state_of(rows[place]), float(weights[place]))
    return rule.result()


def trimmed(rows: Matrix, out: int) -> Matrix:
    """By taking the largest and the smallest out one after the other."""
    rows = rows.copy()
    for _ in range(out):
        for extreme in (np.nanargmax, np.nanargmin):
            rows[extreme(rows, axis=0), np.arange(rows.shape[1])] = np.nan
    mean: Matrix = np.nanmean(rows, axis=0)
    return mean


def weiszfeld(rows: Matrix, weights: Matrix, smoothing: float) -> Matrix:
    middle = np.average(rows, axis=0, weights=weights)
    for _ in range(200):
        pulls = weights / np.maximum(np.linalg.norm(rows - middle, axis=1), smoothing)
        middle = np.average(rows, axis=0, weights=pulls)
    return middle


def krum_order(rows: Matrix, poisoned: int) -> list[int]:
    scores = []
    for one in rows:
        distances = sorted(float(np.sum((one - other) ** 2)) for other in rows)
        scores.append(sum(distances[1 : 1 + len(rows) - poisoned - 2]))
    return sorted(range(len(rows)), key=lambda place: scores[place])


def shortened(rows: Matrix, weights: Matrix, norm: float | None) -> Matrix:
    changes = rows - start()
    norms = np.linalg.norm(changes, axis=1)
    norm = float(np.median(norms)) if norm is None else norm
    short = np.array([change * min(1.0, norm / length) for change, length in zip(changes, norms, strict=True)])
    after: Matrix = start() + np.average(short, axis=0, weights=weights)
    return after


Reference = Callable[[Matrix, Matrix], Matrix]
REFERENCES: dict[str, tuple[str, dict[str, Any], Reference]] = {
    "median": ("median", {}, lambda rows, _: np.median(rows, axis=0)),
    "a tenth": ("trimmed_mean", {"share": 0.1}, lambda rows, _: trimmed(rows, 1)),
    "a fifth": ("trimmed_mean", {}, lambda rows, _: trimmed(rows, {5: 1, 6: 2, 9: 2}[len(rows)])),
    "nearly all": ("trimmed_mean", {"share": 0.49}, lambda rows, _: np.median(rows, axis=0)),
    "none": ("trimmed_mean", {"share": 0.0}, lambda rows, _: rows.mean(axis=0)),
    "geometric median": ("geometric_median", {}, lambda rows, weights: weiszfeld(rows, weights, 1e-6)),
    "much smoothed": (
        "geometric_median", {"smoothing": 30.0}, lambda rows, weights: weiszfeld(rows, weights, 30.0)),
    "krum": ("krum", {}, lambda rows, _: rows[krum_order(rows, 1)[0]]),
    "multi-krum": (
        "multi_krum", {},
        lambda rows, weights: np.average(
            rows[krum_order(rows, 1)[:-1]], axis=0, weights=weights[krum_order(rows, 1)[:-1]]),
    ),
    "two of multi-krum": (
        "multi_krum", {"chosen": 2},
        lambda rows, weights: np.average(
            rows[krum_order(rows, 1)[:2]], axis=0, weights=weights[krum_order(rows, 1)[:2]]),
    ),
    "median norm": ("norm_clipped_mean", {}, lambda rows, weights: shortened(rows, weights, None)),
    "given norm": ("norm_clipped_mean", {"norm": 20.0}, lambda rows, weights: shortened(rows, weights, 20.0)),
}  # fmt: skip


@pytest.mark.parametrize("count", [5, 6, 9])
@pytest.mark.parametrize("poisoned", [0, 1])
@pytest.mark.parametrize("case", REFERENCES)
def test_a_rule_is_its_formula(case: str, poisoned: int, count: int) -> None:
    name, settings, reference = REFERENCES[case]
    rows, weights = sent(count, poisoned), weights_of(count)
    own = result_of(name, rows, weights, **settings)
    np.testing.assert_allclose(own.buffer, reference(rows, weights), rtol=0, atol=1e-6)


def test_every_rule_has_a_reference() -> None:
    assert {name for name, _, _ in REFERENCES.values()} == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_arrival_changes_no_bit(name: str) -> None:
    """Neither where two sites sent the same, or lie equally near to the others."""
    rows, weights = sent(6, 1), weights_of(6)
    rows[1], weights[1] = rows[0], weights[0] + 1
    orders = list(permutations(range(6)))[::97]
    assert len({result_of(name, rows, weights, order).digest for order in orders}) == 1


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "geometric_median", "norm_clipped_mean"])
def test_one_site_alone_is_its_own_state(name: str) -> None:
    rows = sent(1)
    np.testing.assert_allclose(result_of(name, rows, [3.0]).buffer, rows[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "geometric_median", "norm_clipped_mean"])
def test_sites_that_all_sent_the_same_get_it_back(name: str) -> None:
    """The distances and the changes are 0 then; nothing is divided by them."""
    np.testing.assert_allclose(result_of(name, np.array([start()] * 4), [1.0] * 4).buffer, start(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["krum", "multi_krum"])
def test_krum_takes_no_fewer_updates_than_its_proof(name: str) -> None:
    with pytest.raises(ProtocolError, match="6 updates came, and with 2 poisoned it takes 7"):
        result_of(name, sent(6), weights_of(6), poisoned=2)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("state", "weight", "said"),
    [
        (state_of(np.full(SIZE, np.nan)), 1.0, "NaN"),
        (state_of(np.zeros(SIZE)), 0.0, "weight 0.0"),
        (state_of(np.zeros(3), Manifest.of({"b": (3,)})), 1.0, "another manifest"),
    ],
    ids=["NaN", "weight", "manifest"],
)
def test_what_must_not_enter_a_result_changes_nothing(
    name: str, state: TrainableState, weight: float, said: str
) -> None:
    rows, weights = sent(5), weights_of(5)
    rule = made(name, {})
    for row, given in zip(rows, weights, strict=True):
        rule.add(state_of(row), float(given))
    with pytest.raises(ProtocolError, match=said):
        rule.add(state, weight)
    assert rule.result().digest == result_of(name, rows, weights).digest


@pytest.mark.parametrize("name", RULES)
def test_a_result_takes_the_memory_of_one_state_beside_the_updates(name: str) -> None:
    manifest = Manifest.of({"a": (32 * PIECE,)})
    random = np.random.default_rng(0)
    rule = made(name, {}, manifest, np.zeros(manifest.size))
    for _ in range(5):
        rule.add(state_of(random.normal(size=manifest.size), manifest), 1.0)
    tracemalloc.start()
    try:
        rule.result()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * manifest.size + 40 * 8 * PIECE // 8 * 5
