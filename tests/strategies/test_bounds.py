"""The most that one site's update can be: what is just possible passes, what is more is refused with both numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.trainable import DataReport, EvalReport, TrainReport
from core_training.recipe.schema import Recipe
from strategies.bounds import change_norm, check_change, check_evaluation, check_report, most_rows
from strategies.draws import PIECE

STEPS = 3
DATA = DataReport(10, 2, 0, 0)
ROWS, TOKENS = 4, 64
"""Of a batch; of a row."""


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(
        topology={"kind": "federated", "rounds": 2, "local_steps": STEPS}, training={"learning_rate": 1e-3}
    )


@pytest.mark.parametrize(
    ("records", "processes", "most"), [(10, 1, 4), (4, 1, 4), (3, 1, 3), (1000, 2, 9), (1, 2, 4), (7, 2, 7), (1, 1, 1)]
)
def test_a_step_takes_no_more_rows_than_batches_and_records_allow(
    recipe: Recipe, records: int, processes: int, most: int
) -> None:
    assert most_rows(recipe, records, processes) == most


def test_a_site_reports_no_more_weight_and_tokens_than_its_steps_can_have(recipe: Recipe) -> None:
    weight, tokens = ROWS * STEPS * TOKENS, 2 * ROWS * STEPS * (TOKENS + recipe.rollout.max_new_tokens)
    report = TrainReport(STEPS, 1.0, 1.0, 1.0, weight, tokens, 0.0)
    check_report(recipe, STEPS, report, DATA, 1)
    with pytest.raises(ProtocolError, match=f"weight {weight + 1} is more than 3 steps can have, {weight}"):
        check_report(recipe, STEPS, replace(report, weight=weight + 1), DATA, 1)
    with pytest.raises(ProtocolError, match=f"{tokens + 1} tokens are more than 3 steps can have, {tokens}"):
        check_report(recipe, STEPS, replace(report, tokens=tokens + 1), DATA, 1)


def test_an_evaluation_is_of_no_more_records_and_weight_than_were_announced(recipe: Recipe) -> None:
    most = 2 * (TOKENS + recipe.rollout.max_new_tokens)
    check_evaluation(recipe, EvalReport(1.0, most, 2), DATA)
    for beyond in (EvalReport(1.0, most + 1, 2), EvalReport(1.0, most, 3)):
        with pytest.raises(ProtocolError, match="it announced 2 held-out records"):
            check_evaluation(recipe, beyond, DATA)


@pytest.mark.parametrize(
    ("stage", "lowest", "highest"),
    [("sft", 0.0, 1e4), ("pretrain", 0.0, 1e4), ("reward", 0.0, 1e8), ("kto", 0.0, 1e8), ("dpo", -1e8, 1e8)],
)
def test_an_evaluations_loss_is_what_the_stage_can_give(
    make_recipe: Callable[..., Recipe], stage: str, lowest: float, highest: float
) -> None:
    recipe = make_recipe(stage=stage)
    for loss in (lowest, highest, -1e-6):  # the last by rounding
        check_evaluation(recipe, EvalReport(2 * loss, 2, 2), DATA)
    for loss in (1.1 * lowest - 1.0, 1.1 * highest, -1e36, 1e36):
        with pytest.raises(ProtocolError, match=f"beyond what stage {stage} can give"):
            check_evaluation(recipe, EvalReport(2 * loss, 2, 2), DATA)


def test_an_evaluation_of_nothing_has_no_loss(recipe: Recipe) -> None:
    """Or a weight of zero would move the mean of all sites wherever it likes."""
    check_evaluation(recipe, EvalReport(0.0, 0, 0), DATA)
    for loss in (-1.0, 1.0):
        with pytest.raises(ProtocolError, match="beyond what stage sft can give"):
            check_evaluation(recipe, EvalReport(loss, 0, 0), DATA)


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, 2 * PIECE + 4])
def test_a_change_counts_wherever_in_the_state_it_is(recipe: Recipe, place: int) -> None:
    manifest = Manifest.of({"w": (2 * PIECE + 5,)})
    start = TrainableState(manifest, np.zeros(manifest.size, dtype=np.float32))
    most = 10_000 * 1e-3 * STEPS * manifest.size**0.5

    def moved(by: float) -> TrainableState:
        trained = start.buffer.copy()
        trained[place] = by
        return TrainableState(manifest, trained)

    assert change_norm(moved(-3.0), start) == 3.0
    check_change(recipe, STEPS, moved(0.999 * most), start)
    with pytest.raises(ProtocolError, match="is the most"):
        check_change(recipe, STEPS, moved(-1.001 * most), start)
    for absurd in (np.nan, np.inf):
        with pytest.raises(ProtocolError, match="NaN or infinite"):
            check_change(recipe, STEPS, moved(absurd), start)
