"""What releases come to: published figures, closed forms, and a second accountant's opinion."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from core_training.foundation.errors import InputError
from core_training.privacy import accounting
from core_training.privacy.accounting import Release, epsilon_of, noise_multiplier_for
from core_training.privacy.mechanism import RecordMechanism
from core_training.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


def gaussian_delta(epsilon: float, noise: float) -> float:
    """The δ of one Gaussian mechanism (Balle and Wang 2018, theorem 8)."""

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return normal(0.5 / noise - epsilon * noise) - math.exp(epsilon) * normal(-0.5 / noise - epsilon * noise)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (1.0, 10), (2.0, 10)])
def test_releases_about_all_units_are_one_gaussian(noise: float, steps: int) -> None:
    epsilon = epsilon_of([Release("record", 1.0, noise, steps)], 1e-5)
    assert gaussian_delta(epsilon, noise / math.sqrt(steps)) == pytest.approx(1e-5, rel=0.02)


def test_a_published_figure() -> None:
    """1,000 records, 8 in a batch, 100 steps at noise 0.6: 3.37 by privacy loss distributions."""
    assert epsilon_of([Release("record", 0.008, 0.6, 100)], 1e-5) == pytest.approx(3.37, abs=0.02)


@pytest.mark.parametrize(("rate", "noise", "steps"), [(0.01, 1.0, 500), (0.05, 0.8, 60)])
def test_another_accountant_says_the_same(rate: float, noise: float, steps: int) -> None:
    prv: Any = pytest.importorskip("opacus.accountants").PRVAccountant()
    prv.history = [(noise, rate, steps)]
    assert epsilon_of([Release("record", rate, noise, steps)], 1e-5) == pytest.approx(prv.get_epsilon(1e-5), rel=0.02)


@pytest.mark.parametrize("noise", [1e-9, 1e-3, 0.05])
def test_noise_that_hides_nothing_is_told_as_such(noise: float) -> None:
    """By privacy loss distributions it would take more memory than there is."""
    assert 200 < epsilon_of([Release("record", 0.1, noise, 50)], 1e-5) < math.inf


def test_releases_add_up_whatever_their_order() -> None:
    releases = [Release("record", 0.02, 1.0, 30), Release("record", 0.05, 2.0, 10), Release("record", 0.02, 1.0, 20)]
    together = epsilon_of(releases, 1e-5)
    assert together == epsilon_of(reversed(releases), 1e-5)
    assert together == epsilon_of([releases[1], Release("record", 0.02, 1.0, 50)], 1e-5)
    assert together > epsilon_of(releases[:2], 1e-5)
    assert epsilon_of([], 1e-5) == 0.0


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(8.0, 0.05, 50), (1.0, 1.0, 10)])
def test_the_least_noise_for_an_epsilon(epsilon: float, rate: float, steps: int) -> None:
    noise = noise_multiplier_for(epsilon, 1e-5, rate, steps)
    assert epsilon_of([Release("record", rate, noise, steps)], 1e-5) <= epsilon
    assert epsilon_of([Release("record", rate, noise * 0.97, steps)], 1e-5) > epsilon


def test_an_epsilon_that_no_noise_gives_is_refused() -> None:
    with pytest.raises(InputError, match="no noise makes"):
        noise_multiplier_for(1e-6, 1e-9, 1.0, 10**6)


def test_without_the_accountant_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(accounting.importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'fedloom\[privacy\]'"):
        epsilon_of([Release("record", 0.123, 1.0, 3)], 1e-5)


def test_a_mechanism_follows_from_recipe_and_units(make_recipe: MakeRecipe) -> None:
    terms = {"differential_privacy": {"noise_multiplier": 1.0}}
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 30}
    mechanism = RecordMechanism.of(make_recipe(training=training, privacy=terms), 80)
    assert mechanism is not None
    assert (mechanism.sampling_rate, mechanism.steps) == (0.1, 30)
    assert RecordMechanism.of(make_recipe(), 80) is None
    few = RecordMechanism.of(make_recipe(training=training, privacy=terms), 5)
    assert few is not None
    assert few.sampling_rate == 1.0


def test_epochs_are_counted_in_units(make_recipe: MakeRecipe) -> None:
    training = {"per_device_train_batch_size": 4, "max_steps": None, "num_train_epochs": 3}
    terms = {"differential_privacy": {"noise_multiplier": 1.0}}
    mechanism = RecordMechanism.of(make_recipe(training=training, privacy=terms), 10)
    assert mechanism is not None
    assert mechanism.steps == 8
