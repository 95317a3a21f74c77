"""A batch computed in parts is the batch computed at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.data.rows import parts
from core_training.engine.engine import Engine, open_engine
from core_training.models import prepared_model
from core_training.recipe.schema import Recipe
from core_training.stages.base import BatchLoss
from tests.core_training.preference_data import stage_recipe

MakeRecipe = Callable[..., Recipe]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(1, 500))
def test_every_row_is_in_one_part_and_only_a_single_row_may_be_too_long(sizes: list[int], at_once: int) -> None:
    found = parts(sizes, at_once)
    assert sorted(index for part in found for index in part) == list(range(len(sizes)))
    assert all(len(part) == 1 or len(part) * max(sizes[index] for index in part) <= at_once for part in found)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "orpo", "simpo"])
def test_parts_give_the_step_and_the_report_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, make_recipe: MakeRecipe, tmp_path: Path, stage: str
) -> None:
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 2, "per_device_train_batch_size": 8}
    recipe = stage_recipe(make_recipe, tmp_path, stage, training={**settings, "packing": False})
    counts: list[int] = []
    inner = prepared_model.parts

    def counting(sizes: list[int], at_once: int) -> list[list[int]]:
        counts.append(len(found := inner(sizes, at_once)))
        return found

    monkeypatch.setattr(prepared_model, "parts", counting)
    engines: list[Engine] = []
    reports = []
    for at_once, expected in ((1, 8), (1_000_000, 1)):
        monkeypatch.setattr(prepared_model, "TOKENS_AT_ONCE", at_once)
        engines.append(open_engine(recipe))
        reports.append((engines[-1].train(2), engines[-1].evaluate()))
        assert expected in counts
        counts.clear()
    (one, judged_one), (other, judged_other) = reports
    assert (one.steps, one.weight, one.tokens) == (other.steps, other.weight, other.tokens)
    assert (one.loss_first, one.loss_last) == pytest.approx((other.loss_first, other.loss_last), abs=2e-6)
    assert {name: value for name, (value, _) in one.figures.items()} == pytest.approx(
        {name: value for name, (value, _) in other.figures.items()}, abs=1e-4
    )
    np.testing.assert_allclose(engines[0].read_state().buffer, engines[1].read_state().buffer, atol=1e-6)
    for source, report in judged_one.items():
        assert (report.weight, report.examples) == (judged_other[source].weight, judged_other[source].examples)
        assert report.loss == pytest.approx(judged_other[source].loss, abs=2e-6)


def test_a_loss_in_parts_has_the_sums_of_the_whole() -> None:
    import torch

    one, two = (
        BatchLoss(
            *(torch.tensor(float(i * k)) for i in (1, 2, 3)), {"margin": (torch.tensor(4.0 * k), torch.tensor(k))}
        )
        for k in (1, 10)
    )
    assert (one + two).sums().tolist() == (one.sums() + two.sums()).tolist()
