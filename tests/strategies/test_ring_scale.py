"""The limits of a ring: what the optimizers can do, where the rules settle, and what they keep of learning."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.errors import InputError, ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.recipe.schema import Recipe
from strategies.draws import rounding_key
from strategies.fedavg import MOST_PROCESSES, FedAvg, most_weight
from strategies.ring import RingCodec, RingSum
from strategies.ring_scale import LEVELS, Scale, first_scale, largest_change, level_of, next_scale, widened

MakeRecipe = Callable[..., Recipe]
FEDERATED = {"kind": "federated", "rounds": 10, "local_steps": 5}
NOTHING = (0,) * LEVELS


def rows(*tops: int | None) -> list[tuple[int, ...]]:
    """Counts of one site on these levels."""
    return [NOTHING if top is None else tuple(int(level == top) for level in range(LEVELS)) for top in tops]


@given(st.floats(1e-30, 1e30), st.floats(1e-30, 1e30))
def test_a_level_says_how_often_the_limit_can_be_halved(value: float, limit: float) -> None:
    level = level_of(value, limit)
    assert level == sum(value <= limit / 2**halvings for halvings in range(LEVELS - 1))


def test_a_tensor_that_did_not_move_says_nothing() -> None:
    assert level_of(0.0, 1.0) is None


def test_adam_cannot_move_a_value_further_than_its_limit_whatever_the_gradients() -> None:
    """Against PyTorch's AdamW under the gradients that Cauchy and Schwarz say are the worst: g_t ~ (β₂/β₁)^t."""
    beta1, beta2, rate = 0.9, 0.999, 0.01
    closed_form = math.sqrt((1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1**2 / beta2)))
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=rate, eps=0.0, weight_decay=0.0)
    furthest = 0.0
    for step in range(2500):
        weight.grad = torch.tensor([(beta2 / beta1) ** (step - 1500)], dtype=torch.float64)
        before = weight.item()
        optimizer.step()
        furthest = max(furthest, abs(weight.item() - before) / rate)
    assert 7.2 < closed_form < 7.3
    assert 0.95 * closed_form < furthest <= closed_form


def test_the_largest_change_follows_from_optimizer_rate_and_steps(make_recipe: MakeRecipe) -> None:
    training: dict[str, Any] = {"learning_rate": 1e-3}
    assert largest_change(make_recipe(topology=FEDERATED, training=training)) == pytest.approx(16 * 5e-3)
    training |= {"optim": "sgd", "max_grad_norm": 0.5}
    assert largest_change(make_recipe(topology=FEDERATED, training=training)) == pytest.approx(5e-3)
    ppo = {
        "stage": "ppo",
        "rollout": {"reward_function": "judge.py:judge"},
        "ppo": {"num_ppo_epochs": 3, "num_mini_batches": 2},
        "training": {"learning_rate": 1e-3},
    }
    assert largest_change(make_recipe(topology=FEDERATED, **ppo)) == pytest.approx(16 * 6 * 5e-3)
    own = make_recipe(topology=FEDERATED, privacy={"secure_aggregation": True, "clip": 0.25})
    assert largest_change(own) == 0.25


def test_a_recipe_that_bounds_nothing_is_asked_for_a_clip(make_recipe: MakeRecipe) -> None:
    training = {"optim": "sgd", "max_grad_norm": 0.0}
    with pytest.raises(InputError, match=r"privacy\.clip: codec ring16 needs it"):
        largest_change(make_recipe(topology=FEDERATED, training=training, privacy={"codec": "ring16"}))
    bounded = make_recipe(topology=FEDERATED, training=training, privacy={"codec": "ring16", "clip": 1.0})
    assert first_scale(bounded, Manifest.of({"w": (100,)})).exponents[0] >= 0


@pytest.mark.parametrize("beta", [{"adam_beta1": 0.5}, {"adam_beta2": 0.9999}])
def test_the_bound_of_adams_steps_is_that_of_its_usual_betas(make_recipe: MakeRecipe, beta: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"privacy\.clip: codec ring16 needs it"):
        largest_change(make_recipe(topology=FEDERATED, training=beta, privacy={"codec": "ring16"}))
    assert (
        largest_change(make_recipe(topology=FEDERATED, training=beta, privacy={"codec": "ring16", "clip": 0.5})) == 0.5
    )


def test_after_an_update_that_did_not_fit_the_first_scale_comes_next_and_then_the_recipes_limits(
    recipe_of_scales: Recipe,
) -> None:
    manifest = Manifest.of({"a": (4,), "b": (9,)})
    first = first_scale(recipe_of_scales, manifest)
    assert first.exponents == [2, 2]
    narrow = Scale(exponents=[7, 1], weight_cap=64)
    wider = [narrow]
    for _ in range(3):
        wider.append(widened(wider[-1], recipe_of_scales, manifest))
    assert [scale.exponents for scale in wider] == [[7, 1], [2, 1], [0, 0], [0, 0]]
    assert {scale.weight_cap for scale in wider} == {64}


def test_the_first_scale_starts_wide(make_recipe: MakeRecipe) -> None:
    manifest = Manifest.of({"bias": (4,), "table": (1 << 20,)})
    adam = make_recipe(topology=FEDERATED)
    scale = first_scale(adam, manifest)
    assert scale.exponents == [2, 2]
    # No site of one process can have more tokens than: 4 rows, 64 tokens long, in each of 5 steps.
    assert scale.weight_cap == 2048 >= 4 * 64 * 5
    sgd = make_recipe(topology=FEDERATED, training={"optim": "sgd"})
    assert first_scale(sgd, manifest).exponents == [0, 7]
    narrow = make_recipe(topology=FEDERATED, privacy={"codec": "ring16", "clip": 1e-6})
    assert first_scale(narrow, manifest).exponents == [0, 0]


@given(st.integers(0, 20), st.floats(0.0001, 0.5), st.integers(1, 5000))
def test_limits_settle_at_four_to_eight_times_the_largest_change_and_stay(
    recipe_of_scales: Recipe, exponent: int, peak: float, weight: int
) -> None:
    scale = Scale(exponents=[exponent], weight_cap=2048)
    history = []
    for _ in range(20):
        levels = rows(level_of(peak, 4.0 * 2.0 ** -scale.exponents[0]), level_of(weight, scale.weight_cap))
        following = next_scale(scale, levels, recipe_of_scales)
        assert -3 <= following.exponents[0] - scale.exponents[0] <= 2
        scale = following
        history.append(scale)
    assert 4 * peak <= 4.0 * 2.0 ** -scale.exponents[0] < 8 * peak
    assert 2 * weight <= scale.weight_cap < 4 * weight
    assert len(set(map(repr, history[-4:]))) == 1


@pytest.fixture(scope="module")
def recipe_of_scales() -> Recipe:
    training = {"learning_rate": 2e-4}
    sections = {"model": {"name_or_path": "base"}, "stage": "sft", "training": training, "topology": FEDERATED}
    return Recipe.model_validate(sections)


def test_one_site_with_a_large_change_is_enough_to_widen_a_limit(recipe_of_scales: Recipe) -> None:
    levels = [(1, 0, 0, 0, 0, 15), (0, 0, 0, 16, 0, 0), NOTHING, (0, 0, 16, 0, 0, 0)]
    scale = next_scale(Scale(exponents=[7, 7, 7], weight_cap=64), levels, recipe_of_scales)
    assert scale == Scale(exponents=[4, 7, 7], weight_cap=64)


def test_a_site_that_always_claims_more_weight_cannot_raise_the_cap_beyond_what_there_can_be(
    recipe_of_scales: Recipe,
) -> None:
    scale = Scale(exponents=[0], weight_cap=64)
    for _ in range(40):
        scale = next_scale(scale, rows(0, 0), recipe_of_scales)
    most = most_weight(recipe_of_scales, 5)
    assert most <= scale.weight_cap < 2 * most
    assert scale.exponents == [0]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"exponents": [41], "weight_cap": 1}, r"scale\.exponents\.0"),
        ({"exponents": [-1], "weight_cap": 1}, r"scale\.exponents\.0"),
        ({"exponents": [0], "weight_cap": 3}, "3 is not a power of two"),
        ({"exponents": [0], "weight_cap": 0}, r"scale\.weight_cap"),
        ({"exponents": [0], "weight_cap": 2**49}, r"scale\.weight_cap"),
        ({"exponents": [0]}, r"scale\.weight_cap"),
        ("wide", "scale"),
    ],
)
def test_a_scale_that_is_none_is_refused_by_field(document: Any, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        Scale.from_json(document)


def test_a_scale_comes_back_from_json() -> None:
    scale = Scale(exponents=[0, 40], weight_cap=2**48)
    assert Scale.from_json(scale.model_dump(mode="json")) == scale


def test_the_widest_scale_cuts_nothing_that_one_of_them_does_not() -> None:
    scales = [Scale(exponents=[3, 1], weight_cap=8), Scale(exponents=[2, 5], weight_cap=4)]
    assert Scale.widest(scales) == Scale(exponents=[2, 1], weight_cap=8)
    with pytest.raises(ProtocolError, match="different numbers of tensors"):
        Scale.widest([scales[0], Scale(exponents=[1], weight_cap=8)])


QUADRATIC = Manifest.of({"small": (10,), "wide": (20, 20)})
CURVATURE = np.geomspace(0.01, 10, QUADRATIC.size)


def learnt(recipe: Recipe, sites: int, ring: bool) -> float:
    """The loss that federated training ends with on Σᵢ ½‖w − wᵢ‖², measured in units of each value's curvature.

    Sites have optima far apart, tokens that differ sixfold, and gradients with noise in them.
    """
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(QUADRATIC.size)
    optima = torch.from_numpy(shared + rng.standard_normal((sites, QUADRATIC.size)))
    weights = rng.integers(100, 600, size=sites)
    curvature = torch.from_numpy(CURVATURE)
    points = torch.zeros((sites, QUADRATIC.size), dtype=torch.float64, requires_grad=True)
    training, steps, rounds = recipe.training, 5, recipe.topology.rounds or 0
    kind = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}[training.optim]
    optimizer = kind([points], lr=recipe.training.learning_rate, weight_decay=0.0)
    noise = torch.Generator().manual_seed(1)
    state = TrainableState(QUADRATIC, np.zeros(QUADRATIC.size, dtype=np.float32))
    scale = first_scale(recipe, QUADRATIC)
    for number in range(rounds):
        with torch.no_grad():
            points.copy_(torch.from_numpy(state.buffer.astype(np.float64)))
        for _ in range(steps):
            gradient = curvature * (points.detach() - optima)
            gradient += 0.5 * torch.randn(gradient.shape, generator=noise, dtype=torch.float64)
            if training.optim == "sgd":
                gradient *= (training.max_grad_norm / gradient.norm(dim=1, keepdim=True)).clamp(max=1)
            points.grad = gradient
            optimizer.param_groups[0]["lr"] = recipe.training.learning_rate * (1 - number / rounds)
            optimizer.step()
        trained = [TrainableState(QUADRATIC, row) for row in points.detach().numpy().astype(np.float32)]
        if ring:
            codec = RingCodec(QUADRATIC, 16, sites, largest_change(recipe), scale)
            total = RingSum(codec)
            for site, (one, weight) in enumerate(zip(trained, weights.tolist(), strict=True)):
                total.add(codec.encode(one, state, weight, [], rounding_key(0, str(site), number)))
            outcome = total.result(state)
            scale, state = next_scale(scale, outcome.levels, recipe), outcome.state
        else:
            mean = FedAvg(QUADRATIC)
            for one, weight in zip(trained, weights.tolist(), strict=True):
                mean.add(one, weight)
            state = mean.result()
    optimum = np.average(optima.numpy(), axis=0, weights=weights)
    return float((CURVATURE * (state.buffer - optimum) ** 2).sum() / (CURVATURE * optimum**2).sum())


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("sites", [3, 100])
def test_the_ring_that_is_chosen_by_itself_loses_nothing_measurable(
    make_recipe: MakeRecipe, optim: str, sites: int
) -> None:
    """As shares of the loss at the start, above what the best state has; heterogeneity leaves some to both."""
    recipe = make_recipe(
        topology={**FEDERATED, "rounds": 40},
        training={"optim": optim, "learning_rate": 0.02 if optim == "adamw_torch" else 0.3},
        privacy={"secure_aggregation": True},
    )
    plain, ring = learnt(recipe, sites, ring=False), learnt(recipe, sites, ring=True)
    assert plain < 0.5
    assert abs(ring - plain) < 1e-3


@pytest.mark.parametrize(
    ("stage", "settings", "units"),
    [
        ("ppo", {"num_ppo_epochs": 3, "num_mini_batches": 2}, 10 * 3),  # tokens of an answer, passes
        ("rloo", {"num_generations": 5, "num_iterations": 2}, 5 * 2),  # answers
        ("grpo", {"num_generations": 3, "num_iterations": 2}, 10 * 3 * 2),
    ],
)
def test_the_bound_on_a_weight_is_that_of_the_stage_that_runs(stage: str, settings: dict[str, int], units: int) -> None:
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": "unused"},
            "stage": stage,
            stage: settings,
            "rollout": {"reward_model": "unused", "max_new_tokens": 10},
            "training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        }
    )
    assert most_weight(recipe, steps=7) == 2 * 4 * 7 * MOST_PROCESSES * units
