"""IA³ and VeRA: PEFT's own, found again by it, and what a mean over sites makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftType, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from core_training.foundation.errors import InputError
from core_training.foundation.state import TrainableState
from core_training.models.base_model import BaseModel
from core_training.models.parameters import write_parameters
from core_training.models.probe import logits_of
from core_training.parts.tuning_modes import NOT_AVERAGED, TUNING_MODES
from core_training.recipe.schema import Recipe
from tests.families.building import make_family
from tests.families.walk import WALKS, Family

MakeRecipe = Callable[..., Recipe]
MODES: dict[str, dict[str, Any]] = {"ia3": {}, "vera": {"vera": {"r": 8}}}


def moved(base: BaseModel, seed: int) -> TrainableState:
    """A state near the first one."""
    state = base.initial_state
    noise = torch.randn(state.manifest.size, generator=torch.Generator().manual_seed(seed)).numpy()
    return TrainableState(state.manifest, state.buffer + 0.1 * noise)


def merged_weights(base: BaseModel, state: TrainableState) -> dict[str, torch.Tensor]:
    """The weights of the model with the adapter in them."""
    write_parameters(base.trainable_parameters, state)
    model: Any = base.model
    model.merge_adapter()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    model.unmerge_adapter()
    return weights


@pytest.mark.parametrize("mode", MODES)
def test_it_is_pefts_own(make_recipe: MakeRecipe, tiny_model: Path, mode: str) -> None:
    base = BaseModel(make_recipe(tuning={"mode": mode, **MODES[mode]}))
    set_seed(0)
    config = IA3Config() if mode == "ia3" else VeraConfig(r=8, target_modules="all-linear", save_projection=False)
    config.task_type = "CAUSAL_LM"
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    ours = {name: p for name, p in base.model.named_parameters() if p.requires_grad}
    expected = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert ours.keys() == expected.keys()
    for model in (ours, expected):
        for number, name in enumerate(sorted(model)):
            model[name].data += 0.1 * torch.randn(model[name].shape, generator=torch.Generator().manual_seed(number))
    assert torch.equal(logits_of(base.model), logits_of(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", ["adapter", "reward", "topologies", "grpo"])
def test_it_works_where_lora_does(tiny_model: Path, tmp_path: Path, mode: str, cell: str) -> None:
    class Small(Family):
        def recipe(self, name: str, **sections: Any) -> Recipe:
            return super().recipe(name, **{**sections, "tuning": {"mode": mode, **MODES[mode]}})

    WALKS[cell](Small("llama", tiny_model, tmp_path))


def test_the_mean_of_factors_is_the_factor_of_the_mean(make_recipe: MakeRecipe) -> None:
    """With IA³ exactly so; of LoRA's and VeRA's products the mean is near, and no more."""
    for mode in ("ia3", "vera", "lora"):
        base = BaseModel(make_recipe(tuning={"mode": mode, **MODES.get(mode, {})}))
        one, two = moved(base, 1), moved(base, 2)
        mean = TrainableState(one.manifest, (one.buffer + two.buffer) / 2)
        first, second, together = (merged_weights(base, state) for state in (one, two, mean))
        far = max(float(((first[n] + second[n]) / 2 - together[n]).abs().max()) for n in together)
        assert (far < 1e-6) == (mode == "ia3")


def test_modules_are_named(make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    chosen = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    base = BaseModel(make_recipe(tuning={"mode": "ia3", "ia3": chosen}))
    assert {name.split(".")[-2] for name in base.trainable_parameters} == {"q_proj", "down_proj"}
    usual = BaseModel(make_recipe(tuning={"mode": "ia3", "ia3": {"target_modules": ["k_proj", "down_proj"]}}))
    shapes = {tuple(p.shape) for n, p in usual.trainable_parameters.items() if "down_proj" in n}
    assert shapes == {(1, 64)}  # hidden units, as without a word
    dense = make_family("deepseek_v3", tiny_model, tmp_path / "deepseek")
    vera = BaseModel(make_recipe(model={"name_or_path": str(dense)}, tuning={"mode": "vera", "vera": {"r": 4}}))
    assert any("shared_experts.down_proj" in name for name in vera.trainable_parameters)
    with pytest.raises(InputError, match=r"tuning.vera.target_modules: 'w1'"):
        BaseModel(make_recipe(tuning={"mode": "vera", "vera": {"target_modules": ["w1"]}}))
    with pytest.raises(InputError, match=r"tuning.ia3.target_modules: 'x' does not fit this model"):
        BaseModel(make_recipe(tuning={"mode": "ia3", "ia3": {"target_modules": ["x"]}}))
    with pytest.raises(InputError, match=r"feedforward_modules: each must be one of target_modules"):
        BaseModel(make_recipe(tuning={"mode": "ia3", "ia3": {**chosen, "target_modules": ["q_proj"]}}))
    unknown = make_family("olmo2", tiny_model, tmp_path / "olmo2")
    with pytest.raises(InputError, match=r"tuning.ia3: .*target_modules"):
        BaseModel(make_recipe(model={"name_or_path": str(unknown)}, tuning={"mode": "ia3"}))


def test_every_method_of_peft_is_a_mode_or_says_why_not() -> None:
    assert {kind.value.lower() for kind in PeftType} <= {*TUNING_MODES, *NOT_AVERAGED}
    assert not TUNING_MODES.keys() & NOT_AVERAGED.keys()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("adalora", "other ranks"),
        ("loha", "product of products"),
        ("oft", "no rotation"),
        ("prefix", "merged"),
        ("xlora", "mixes adapters"),
        ("fourierft", "not offered; mode lora, ia3 or vera"),
        ("ln_tuning", "tuning.freeze.trainable_modules"),
        ("trainable_tokens", "model.add_tokens"),
        ("dora", "mode lora: tuning.lora.use_dora: true"),
        ("rslora", "mode lora: tuning.lora.use_rslora: true"),
        ("pissa", "mode lora: tuning.lora.init_lora_weights: pissa"),
        ("olora", "mode lora: tuning.lora.init_lora_weights: olora"),
    ],
)
def test_what_cannot_be_averaged_says_why(make_recipe: MakeRecipe, mode: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"tuning.mode: '{mode}' is not supported: .*{reason}"):
        make_recipe(tuning={"mode": mode})
