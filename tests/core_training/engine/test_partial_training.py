"""Slices that train a part of the state: what they may not change stays, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import TrainedPart
from core_training.recipe.schema import Recipe
from core_training.recipe.sections.deepspeed import DeepSpeed

MakeRecipe = Callable[..., Recipe]


def changes(before: TrainableState, after: TrainableState) -> dict[str, Any]:
    later = dict(after.tensors())
    return {name: later[name] != values for name, values in before.tensors()}


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "lion_32bit"])
def test_frozen_tensors_and_the_rows_behind_the_first_stay_as_they_are(make_recipe: MakeRecipe, optim: str) -> None:
    engine = open_engine(
        make_recipe(training={"optim": optim, "weight_decay": 0.5, "learning_rate": 0.05, "max_steps": 12})
    )
    engine.train(2)  # so that the optimizer remembers something of all
    names = [spec.name for spec in engine.manifest.tensors]
    of_a, of_b = ([name for name in names if factor in name] for factor in ("lora_A", "lora_B"))
    before = engine.read_state()
    part = TrainedPart(frozenset(of_a[1:]), {of_a[0]: (0, 3), **dict.fromkeys(of_b, (1, 2))})
    engine.begin_round(before, part=part)
    engine.train(3)
    moved = changes(before, engine.read_state())
    assert not any(moved[name].any() for name in of_a[1:])
    assert moved[of_a[0]][:3].any()
    assert not moved[of_a[0]][3:].any()
    assert all(moved[name][:, :2].any() and not moved[name][:, 2:].any() for name in of_b)

    engine.begin_round(engine.read_state())
    engine.train(2)
    assert all(tensor.any() for tensor in changes(before, engine.read_state()).values()), "all of it trains again"


def test_the_gradient_is_clipped_by_what_trains(make_recipe: MakeRecipe) -> None:
    engine = open_engine(
        make_recipe(training={"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e-3, "max_steps": 3})
    )
    engine.train(1)  # until B has moved, A has no gradient
    start = engine.read_state()
    of_b = frozenset(spec.name for spec in engine.manifest.tensors if "lora_B" in spec.name)
    engine.begin_round(start, part=TrainedPart(of_b))
    (rate,) = {group["lr"] for group in engine._current.optimizer.param_groups}
    engine.train(1)
    moved = np.linalg.norm(engine.read_state().buffer.astype(np.float64) - start.buffer)
    assert moved <= rate * 1e-3 * 1.01


def test_a_site_under_deepspeed_refuses_before_it_begins(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        topology={"kind": "federated", "rounds": 2, "local_steps": 1}, aggregation={"adapters": "rolora"}
    ).model_copy(update={"deepspeed": DeepSpeed(stage=2)})
    with pytest.raises(InputError, match=r"deepspeed: aggregation\.adapters: rolora leaves parameters alone"):
        open_engine(recipe)
