"""FedNova against its formula, and against what it is for: an optimum that no site's steps draw away."""

from __future__ import annotations

import numpy as np
import pytest

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from strategies.fedavg import FedAvg
from strategies.fednova import FedNova

MANIFEST = Manifest.of({"a": (5, 3), "b": (4,)})


def state(values: np.ndarray) -> TrainableState:
    return TrainableState(MANIFEST, values.astype(np.float32))


def start_and_changes(sites: int) -> tuple[TrainableState, list[np.ndarray]]:
    random = np.random.default_rng(sites)
    start = state(random.normal(size=MANIFEST.size))
    return start, [0.1 * random.normal(size=MANIFEST.size) for _ in range(sites)]


def test_a_round_is_where_the_formula_says() -> None:
    start, changes = start_and_changes(3)
    steps, weights = [3, 10, 1], [5.0, 2.0, 3.0]
    rule = FedNova(MANIFEST, start)
    for change, count, weight in zip(changes, steps, weights, strict=True):
        rule.add(state(start.buffer + change), weight, count)
    shares = np.array(weights) / 10
    expected = start.buffer + (shares @ steps) * (shares / steps) @ np.stack(changes)
    np.testing.assert_allclose(rule.result().buffer, expected, atol=1e-6)


@pytest.mark.parametrize("sites", [1, 4])
def test_where_all_take_as_many_steps_it_is_the_mean(sites: int) -> None:
    start, changes = start_and_changes(sites)
    nova, mean = FedNova(MANIFEST, start), FedAvg(MANIFEST)
    for number, change in enumerate(changes, start=1):
        nova.add(state(start.buffer + change), float(number), 7)
        mean.add(state(start.buffer + change), float(number))
    np.testing.assert_allclose(nova.result().buffer, mean.result().buffer, atol=1e-7)


def test_it_settles_at_the_optimum_of_the_weighted_losses_and_the_mean_elsewhere() -> None:
    """½‖x − cᵢ‖², gradient descent: a site with n steps of rate η goes (1 − (1 − η)ⁿ)(cᵢ − x)."""
    random = np.random.default_rng(2)
    aims, weights, steps, rate = random.normal(size=(3, MANIFEST.size)), np.array([0.5, 0.3, 0.2]), [20, 5, 1], 1e-3
    settled = {}
    for name in ("nova", "mean"):
        at = state(np.zeros(MANIFEST.size))
        for _ in range(3000):
            rule = FedNova(MANIFEST, at) if name == "nova" else FedAvg(MANIFEST)
            for aim, weight, count in zip(aims, weights, steps, strict=True):
                trained = state(at.buffer + (1 - (1 - rate) ** count) * (aim - at.buffer))
                rule.add(trained, weight, count) if isinstance(rule, FedNova) else rule.add(trained, weight)
            at = rule.result()
        settled[name] = float(np.abs(at.buffer - weights @ aims).max())
    assert settled["nova"] < 0.02
    assert settled["mean"] > 0.2


def test_a_change_without_a_step_is_refused_and_changes_nothing() -> None:
    start, (change,) = start_and_changes(1)
    rule = FedNova(MANIFEST, start)
    rule.add(state(start.buffer + change), 1.0, 2)
    before = rule.result().digest
    for wrong, weight, count in ((start.buffer, 1.0, 0), (start.buffer * np.nan, 1.0, 1), (start.buffer, 0.0, 1)):
        with pytest.raises(ProtocolError):
            rule.add(state(wrong), weight, count)
    assert rule.result().digest == before
