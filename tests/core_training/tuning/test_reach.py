"""The layers that adapters stand on, in families whose layers are not plain linear ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core_training.engine.engine import open_engine
from core_training.models.base_model import BaseModel
from core_training.models.probe import logits_of
from core_training.recipe.schema import Recipe
from core_training.tuning import reach
from tests.families import FAMILIES, make_family

MakeRecipe = Callable[..., Recipe]

ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
MORE = {
    "phimoe": ROUTED,
    "llama4_text": {**ROUTED, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "head_dim": 8},
    "falcon": {"alibi": False, "new_decoder_architecture": False},
}


@pytest.mark.parametrize("family", MORE)
@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_layers_that_are_linear_by_name_alone_are_left_alone(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, mode: str
) -> None:
    """Routers give scores and choices at once; Falcon's layers are plain ones with a forward of their own."""
    monkeypatch.setitem(FAMILIES, family, MORE[family])
    model = make_family(family, tiny_model, tmp_path / family)
    engine = open_engine(make_recipe(model={"name_or_path": str(model)}, tuning={"mode": mode, "lora": {"r": 4}}))
    assert engine.train(2).steps == 2
    names = {name for name, parameter in engine._base.model.named_parameters() if parameter.requires_grad}
    assert not any("router" in name for name in names)
    engine.close()


@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_layers_of_other_classes_are_held_in_four_bits(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setitem(FAMILIES, family, {**FAMILIES.get(family, {}), **MORE.get(family, {})})
    model = make_family(family, tiny_model, tmp_path / family)
    plain = BaseModel(make_recipe(model={"name_or_path": str(model)}))
    held = BaseModel(make_recipe(model={"name_or_path": str(model)}, tuning={"mode": "qlora"}))
    quantised = [name for name, module in held.model.named_modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == 8  # four in each of two layers
    exact, coarse = logits_of(plain.model), logits_of(held.model)
    difference = float((coarse - exact).abs().max())
    assert 0 < difference < 0.5 * float(exact.abs().max())
    assert torch.corrcoef(torch.stack([exact.flatten(), coarse.flatten()]))[0, 1] > 0.9


def test_what_adapters_do_not_reach_is_told_once(
    make_recipe: MakeRecipe,
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The experts of many mixtures are tensors of three dimensions, and no layers."""
    reach._tell.cache_clear()
    monkeypatch.setitem(FAMILIES, "llama4_text", MORE["llama4_text"])
    model = make_family("llama4_text", tiny_model, tmp_path / "llama4")
    for _ in range(2):
        BaseModel(make_recipe(model={"name_or_path": str(model)}))
    assert caplog.text.count("tuning.lora: adapters reach ") == 1
    assert "of the layers' weights; left out: model.layers.*.feed_forward.experts.gate_up_proj (" in caplog.text
    caplog.clear()
    BaseModel(make_recipe())
    assert "adapters reach" not in caplog.text
