"""The ring that hides a site: the clip, the noise in a sum, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import InputError, ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.privacy.mechanism import SiteMechanism
from core_training.privacy.noise import SecretRandom
from core_training.recipe.schema import Recipe
from strategies import figures
from strategies.codec_of_round import ring_codec
from strategies.draws import noise_key
from strategies.ring import Outcome, RingSum
from strategies.ring_scale import Scale, first_scale, next_scale, widened

MakeRecipe = Callable[..., Recipe]
MANIFEST = Manifest.of({"a": (200, 100), "b": (4000,)})
NOTHING = [0] * figures.COUNT


def recipe_of(make_recipe: MakeRecipe, **sections: Any) -> Recipe:
    terms = {"level": "site", "clip": 1.0, "noise_multiplier": 1.0, **sections.pop("terms", {})}
    privacy = {"secure_aggregation": {"minimum_sites": 4}, "codec": "ring32", **sections.pop("privacy", {})}
    topology = {"kind": "federated", "rounds": 3, "local_steps": 2}
    return make_recipe(topology=topology, privacy={**privacy, "differential_privacy": terms}, **sections)


def states(sites: int, norm: float, seed: int = 0) -> tuple[TrainableState, list[TrainableState]]:
    random = np.random.default_rng(seed)
    start = TrainableState(MANIFEST, random.normal(size=MANIFEST.size).astype(np.float32))
    changes = random.normal(size=(sites, MANIFEST.size))
    changes *= norm / np.linalg.norm(changes, axis=1, keepdims=True)
    return start, [TrainableState(MANIFEST, (start.buffer + change).astype(np.float32)) for change in changes]


def summed(recipe: Recipe, start: TrainableState, trained: list[TrainableState]) -> Outcome:
    codec = ring_codec(recipe, MANIFEST, 1, first_scale(recipe, MANIFEST), len(trained))
    total = RingSum(codec)
    for number, state in enumerate(trained):
        total.add(
            codec.encode(state, start, 1, NOTHING, noise_key(f"site {number}", "run", 1, start.digest, state.digest))
        )
    return total.result(start)


def test_the_noise_of_all_sites_but_one_is_what_was_asked_for(make_recipe: MakeRecipe) -> None:
    start, trained = states(4, norm=0.5)
    outcome = summed(recipe_of(make_recipe, terms={"noise_multiplier": 2.0}), start, trained)
    mean = np.mean([one.buffer.astype(np.float64) for one in trained], axis=0)
    noise = (outcome.state.buffer - mean) * 4
    assert noise.std() == pytest.approx(2.0 * math.sqrt(4 / 3), rel=0.02)
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(noise / noise.std(), "norm").pvalue > 1e-3
    assert (outcome.count, outcome.weight, outcome.saturated, outcome.figures) == (4, 4, 0, NOTHING)


def test_without_noise_the_sum_is_that_of_clipped_updates(make_recipe: MakeRecipe) -> None:
    start, trained = states(4, norm=3.0)
    recipe = recipe_of(make_recipe, terms={"noise_multiplier": 1e-4})
    outcome = summed(recipe, start, trained)
    changes = [one.buffer.astype(np.float64) - start.buffer for one in trained]
    clipped = np.mean([change / np.linalg.norm(change) for change in changes], axis=0)
    found = outcome.state.buffer.astype(np.float64) - start.buffer
    assert np.linalg.norm(found - clipped) < 0.03


def test_no_vector_but_for_its_noise_is_longer_than_was_accounted_for(make_recipe: MakeRecipe) -> None:
    recipe = recipe_of(make_recipe, privacy={"codec": "ring16", "secure_aggregation": {"minimum_sites": 4}})
    codec: Any = ring_codec(recipe, MANIFEST, 1, first_scale(recipe, MANIFEST), 4)
    start, (trained,) = states(1, norm=50.0)
    change = codec._change(trained, start)
    change *= codec._clip / codec._step / np.linalg.norm(change)
    lengths = [np.linalg.norm(codec._rounded(change, SecretRandom())) for _ in range(20)]
    assert max(lengths) <= codec._longest
    assert codec._longest < 1.1 * codec._clip / codec._step
    codec._longest = 0.9 * codec._clip / codec._step  # nothing is short enough: towards 0 then
    assert np.linalg.norm(codec._rounded(change, SecretRandom())) <= codec._clip / codec._step


def test_the_same_update_has_the_same_bytes_and_another_another_noise(make_recipe: MakeRecipe) -> None:
    recipe = recipe_of(make_recipe)
    codec = ring_codec(recipe, MANIFEST, 1, first_scale(recipe, MANIFEST), 4)
    start, (first, second) = states(2, norm=1e-9)
    one, again, other = (
        codec.encode(state, start, 1, NOTHING, noise_key("secret", "run", 1, start.digest, state.digest))
        for state in (first, first, second)
    )
    np.testing.assert_array_equal(one, again)
    assert np.count_nonzero(one != other) > 0.9 * MANIFEST.size


def test_no_two_runs_or_rounds_have_the_same_noise() -> None:
    """Their sums' difference, where one lacks a site, would have hardly any."""
    keys = {noise_key("secret", run, number, "start", "trained") for run in ("one", "two") for number in (1, 2)}
    assert len(keys) == 4


def test_two_runs_on_other_terms_do_not_have_the_same_noise(make_recipe: MakeRecipe) -> None:
    """Of x + n and x + n/2 anybody could tell x."""
    start, (trained,) = states(1, norm=0.5)
    key = noise_key("secret", "run", 1, start.digest, trained.digest)
    values = []
    for noise in (2.0, 1.0):
        recipe = recipe_of(make_recipe, terms={"noise_multiplier": noise})
        codec: Any = ring_codec(recipe, MANIFEST, 1, first_scale(recipe, MANIFEST), 4)
        vector = codec.encode(trained, start, 1, NOTHING, key)[: MANIFEST.size].astype(np.int32)
        values.append(vector * codec._step - (trained.buffer.astype(np.float64) - start.buffer))
    assert abs(np.corrcoef(values)[0, 1]) < 0.05


def test_the_scale_stays_and_no_server_chooses_another(make_recipe: MakeRecipe) -> None:
    recipe = recipe_of(make_recipe)
    scale = first_scale(recipe, MANIFEST)
    start, trained = states(4, norm=1.0)
    assert next_scale(scale, summed(recipe, start, trained).levels, recipe) == scale
    assert widened(scale, recipe, MANIFEST) == scale
    for other in (Scale(exponents=[1, 0], weight_cap=1), Scale(exponents=[0, 0], weight_cap=2)):
        with pytest.raises(ProtocolError):
            ring_codec(recipe, MANIFEST, 1, other, 4)


def test_a_ring_of_too_few_bits_is_refused(make_recipe: MakeRecipe) -> None:
    recipe = recipe_of(make_recipe, privacy={"codec": "ring16", "secure_aggregation": {"minimum_sites": 4}})
    with pytest.raises(InputError, match="choose ring24 or ring32"):
        ring_codec(recipe, MANIFEST, 1, first_scale(recipe, MANIFEST), 1000)


def test_an_update_that_would_tell_something_is_not_written(make_recipe: MakeRecipe) -> None:
    recipe = recipe_of(make_recipe)
    codec = ring_codec(recipe, MANIFEST, 1, first_scale(recipe, MANIFEST), 4)
    start, (trained,) = states(1, norm=1.0)
    for weight, told in ((2, NOTHING), (1, [1, *NOTHING[1:]])):
        with pytest.raises(ProtocolError, match="weighs 1 and tells no figures"):
            codec.encode(trained, start, weight, told, bytes(16))
    trained.buffer[3] = np.nan
    with pytest.raises(ProtocolError, match="NaN"):
        codec.encode(trained, start, 1, NOTHING, bytes(16))


def test_ten_rounds_of_all_sites(make_recipe: MakeRecipe) -> None:
    recipe = recipe_of(make_recipe, terms={"noise_multiplier": 1.0})
    mechanism = SiteMechanism.of(recipe)
    assert mechanism is not None
    assert mechanism.share == pytest.approx(1 / math.sqrt(3))
    from core_training.privacy.accounting import epsilon_of

    assert epsilon_of([mechanism.release(20)], 1e-5) == pytest.approx(17.9, abs=0.1)


@pytest.mark.parametrize("deviation", [2.0, 7.5, 300.0])
def test_a_discrete_gaussian_is_one(deviation: float) -> None:
    drawn = SecretRandom(bytes(32)).discrete_normal(300_000, deviation)
    most = int(6 * deviation)
    numbers = np.arange(-most, most + 1)
    expected = np.exp(-(numbers**2) / (2 * deviation**2))
    expected /= expected.sum()
    found = np.bincount(np.clip(drawn, -most, most) + most, minlength=len(numbers)) / len(drawn)
    assert np.abs(found.cumsum() - expected.cumsum()).max() < 1.63 / math.sqrt(len(drawn)) * 1.2
    assert drawn.var() == pytest.approx((numbers**2 * expected).sum(), rel=0.01)
