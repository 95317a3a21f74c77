"""Other ways to compute the same: attention, the compiler, Liger; and NEFTune's noise, which is in training alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.integrations.neftune import activate_neftune

from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.probe import logits_of
from core_training.recipe.schema import Recipe
from tests.families.building import make_family

MakeRecipe = Callable[..., Recipe]


def losses(recipe: Recipe) -> list[float]:
    """First and last training loss, and the held-out one after two steps."""
    engine = open_engine(recipe)
    report = engine.train(2)
    held_out = next(iter(engine.evaluate().values()))
    engine.close()
    return [report.loss_first, report.loss_last, held_out.loss_sum / held_out.weight]


def test_attention_is_computed_as_the_recipe_says(make_recipe: MakeRecipe) -> None:
    kinds = {kind: make_recipe(model={"attn_implementation": kind}) for kind in ("eager", "sdpa")}
    for kind, recipe in kinds.items():
        assert BaseModel(recipe).model.config._attn_implementation == kind
    assert losses(kinds["eager"]) == pytest.approx(losses(kinds["sdpa"]), rel=1e-4)


def test_attention_that_this_machine_lacks_is_named(make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"cannot be loaded: .*[Ff]lash"):
        BaseModel(make_recipe(model={"attn_implementation": "flash_attention_2", "dtype": "bfloat16"}))
    with pytest.raises(InputError, match="attn_implementation: flash_attention_2 is for 16 bits"):
        make_recipe(model={"attn_implementation": "flash_attention_2"})


def test_a_falcon_with_alibi_is_said_to_depend_on_it(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_family("falcon", tiny_model, tmp_path / "falcon", alibi=True)
    for kind in ("eager", "sdpa"):
        caplog.clear()
        BaseModel(make_recipe(model={"name_or_path": str(folder), "attn_implementation": kind}))
        assert ("Falcon with ALiBi" in caplog.text) == (kind == "sdpa")


def test_noise_is_the_librarys_own_and_in_training_alone(make_recipe: MakeRecipe) -> None:
    noisy, plain = (BaseModel(make_recipe(training={"neftune_noise_alpha": alpha})).model for alpha in (5.0, None))
    assert torch.equal(logits_of(noisy), logits_of(plain))
    activate_neftune(plain, 5.0)
    found = []
    for model in (noisy, plain):
        model.train()
        torch.manual_seed(0)
        found.append(model(input_ids=torch.arange(8)[None], use_cache=False).logits)
    assert torch.equal(*found)
    assert not torch.allclose(found[0], plain.eval()(input_ids=torch.arange(8)[None], use_cache=False).logits)
    with pytest.raises(InputError, match="neftune_noise_alpha: stage grpo compares"):
        make_recipe(stage="grpo", rollout={"reward_function": "x.py:f"}, training={"neftune_noise_alpha": 5.0})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler needs a C++ compiler")
def test_a_compiled_model_learns_the_same(make_recipe: MakeRecipe) -> None:
    engines = [open_engine(make_recipe(training={"torch_compile": on})) for on in (True, False)]
    compiled, plain = (engine.train(1) for engine in engines)
    assert compiled.loss_first == pytest.approx(plain.loss_first, rel=1e-5)
    states = [engine.read_state().buffer for engine in engines]
    assert abs(states[0] - states[1]).max() < 1e-5


def test_liger_without_a_gpu_is_said_to_have_no_effect(
    make_recipe: MakeRecipe, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = BaseModel(make_recipe(training={"use_liger_kernel": True}))
    assert "training.use_liger_kernel: without effect here, as it needs a GPU" in caplog.text
    assert torch.equal(logits_of(base.model), logits_of(BaseModel(make_recipe()).model))
