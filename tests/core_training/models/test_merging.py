"""Merging: what comes out says what went in, or nothing comes out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from core_training.foundation.errors import RunError
from core_training.models.base_model import BaseModel
from core_training.models.merging import merged
from core_training.models.probe import logits_of
from core_training.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


def trained(recipe: Recipe) -> BaseModel:
    """A model whose adapters do something."""
    base = BaseModel(recipe)
    generator = torch.Generator().manual_seed(5)
    for parameter in base.trainable_parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return base


@pytest.mark.parametrize(
    "targets", ["all-linear", ["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]]
)
def test_a_merged_model_says_what_the_tuned_one_did(make_recipe: MakeRecipe, targets: str | list[str]) -> None:
    base = trained(make_recipe(tuning={"lora": {"r": 4, "target_modules": targets}}))
    before = logits_of(base.model)
    again = merged(merged(base.model))
    assert (logits_of(again) - before).abs().max() < 1e-4
    assert again.config.tie_word_embeddings is (targets == "all-linear")


def test_a_merge_that_changes_what_the_model_says_does_not_come_out(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT merges two adapters into one shared matrix, were it not parted first."""
    base = trained(make_recipe(tuning={"lora": {"r": 4, "target_modules": ["lm_head"]}}))
    monkeypatch.setattr("core_training.models.merging._part_shared_weights", lambda model: None)
    with pytest.raises(RunError, match=r"merging the adapter changed what the model says: logits .* differ by"):
        merged(base.model)
