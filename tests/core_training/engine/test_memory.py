"""The memory that `recipe check` expects: what can be counted exactly is held against models that are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from core_training.engine.engine import open_engine
from core_training.engine.memory import ShapedRun, estimated_memory
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.precision import train_in_float32
from core_training.models.shapes import ModelShapes
from core_training.recipe.schema import Recipe
from core_training.tuning.base import load_tuning
from tests import tiny
from tests.families.building import tiny_config

MakeRecipe = Callable[..., Recipe]
WIDTHS = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
CONFIGS: dict[str, Callable[[int], Any]] = {
    "llama": lambda layers: LlamaConfig(**WIDTHS, num_hidden_layers=layers, num_key_value_heads=2),
    "tied llama": lambda layers: LlamaConfig(**WIDTHS, num_hidden_layers=layers, tie_word_embeddings=True),
    "qwen3": lambda layers: Qwen3Config(**WIDTHS, num_hidden_layers=layers, num_key_value_heads=2, head_dim=32),
    "gpt2": lambda layers: GPT2Config(vocab_size=300, n_embd=64, n_head=4, n_layer=layers, resid_pdrop=0, attn_pdrop=0),
}


def model_of(kind: str, layers: int, folder: Path, dtype: str = "float32") -> Any:
    """A model with random weights, and its files."""
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](layers), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_shapes_are_those_of_the_model_in_the_files(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, 3, tmp_path, "bfloat16")
    shapes = ModelShapes.of(tmp_path)
    assert shapes.size == sum(parameter.numel() for parameter in model.parameters())
    assert shapes.stored_bytes == 2 * shapes.size
    assert shapes.layers == 3


def test_a_mixture_of_experts_is_refused_whatever_it_calls_their_number(tmp_path: Path) -> None:
    for family in ("mixtral", "ernie4_5_moe"):
        AutoModelForCausalLM.from_config(tiny_config(family, 300)).save_pretrained(tmp_path / family)
        with pytest.raises(InputError, match=f"models of type {family} have experts"):
            ModelShapes.of(tmp_path / family)


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "lfm2", "olmo_hybrid", "recurrent_gemma", "zamba2"])
def test_layers_that_are_no_attention_are_not_counted_as_if_they_were(family: str, tmp_path: Path) -> None:
    settings = {"layer_types": ["conv", "full_attention"]} if family == "lfm2" else {}
    AutoModelForCausalLM.from_config(tiny_config(family, 300, **settings)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"models of type {family} have layers that are no attention .*; --measure"):
        ModelShapes.of(tmp_path)


@pytest.mark.parametrize(
    "tuning",
    [
        {},
        {"lora": {"r": 3, "target_modules": ["q_proj", "down_proj"]}},
        {"lora": {"r": 2, "use_dora": True}},
        {"lora": {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}},
        {"mode": "qlora"},
        {"mode": "full"},
        {"mode": "freeze", "freeze": {"trainable_layers": 1}},
        {"mode": "freeze", "freeze": {"trainable_layers": -1, "trainable_modules": ["mlp"], "extra_modules": ["norm"]}},
    ],
    ids=str,
)
def test_what_is_trained_is_counted_exactly(make_recipe: MakeRecipe, tuning: dict[str, Any]) -> None:
    recipe = make_recipe(tuning=tuning)
    shapes = ModelShapes.of(Path(recipe.model.name_or_path))
    assert ShapedRun(recipe, shapes).trained_size == BaseModel(recipe).manifest.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["lora", "qlora", "freeze", "full"])
def test_weights_are_counted_as_they_are_held(make_recipe: MakeRecipe, tmp_path: Path, dtype: str, mode: str) -> None:
    folder = tiny.make_model(tmp_path / "model", width=64)  # a quantised matrix has whole blocks
    settings = {"mode": mode, "freeze": {"trainable_layers": 1}}
    recipe = make_recipe(model={"name_or_path": str(folder), "dtype": dtype}, tuning=settings)
    model = BaseModel(recipe).model
    held = sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    if dtype == "bfloat16":  # in a forward pass
        held += sum(p.numel() * 2 for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name)
    assert estimated_memory(recipe).weights == pytest.approx(held, abs=64)  # a matrix has whole scales of its scales


@pytest.mark.parametrize(("optim", "moments"), [("adamw_torch", 2), ("sgd", 0)])
def test_what_a_step_leaves_is_counted_exactly(make_recipe: MakeRecipe, optim: str, moments: int) -> None:
    recipe = make_recipe(training={"optim": optim})
    engine = open_engine(recipe)
    engine.train(1)
    states = engine._current.optimizer.state.values()
    held = sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value) and value.dim())
    trained = engine.manifest.size
    assert held == 4 * moments * trained
    assert estimated_memory(recipe).trained == 4 * trained + held + engine.initial_state.buffer.nbytes


def kept_for_the_backward_pass(model: Any, tokens: int) -> int:
    """Bytes of all tensors that autograd keeps, but for parameters and what they are rounded to."""
    parameters = {parameter.numel() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(tokens).unsqueeze(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1).logits
    assert logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "tuning", "off"),
    [
        ("llama", {}, 0.02),
        ("llama", {"lora": {"target_modules": ["q_proj", "v_proj"]}}, 0.02),
        ("qwen3", {}, 0.1),
        ("llama", {"mode": "full"}, 0.03),
    ],
    ids=str,
)
def test_activations_are_those_that_autograd_keeps(
    make_recipe: MakeRecipe, tmp_path: Path, dtype: str, kind: str, tuning: dict[str, Any], off: float
) -> None:
    recipe = make_recipe(model={"dtype": dtype, "name_or_path": str(tmp_path / "3")}, tuning=tuning)
    kept = []
    for layers in (3, 4):  # what is outside of the layers is the same in both
        model = load_tuning(recipe).apply(model_of(kind, layers, tmp_path / str(layers), dtype))
        train_in_float32(model)
        kept.append(kept_for_the_backward_pass(model.train(), tokens=50))
    counted = ShapedRun(recipe, ModelShapes.of(tmp_path / "3")).activations_of_a_layer
    assert counted == pytest.approx((kept[1] - kept[0]) / 50, rel=off)


def test_a_file_of_another_type_is_in_memory_beside_what_is_made_of_it(make_recipe: MakeRecipe) -> None:
    whole, half = (estimated_memory(make_recipe(model={"dtype": dtype})) for dtype in ("float32", "bfloat16"))
    assert half.loading == whole.loading + half.weights  # the file is float32


def test_checkpointing_batches_and_kinds_of_rows_count(make_recipe: MakeRecipe) -> None:
    def step(**sections: Any) -> int:
        return estimated_memory(make_recipe(**sections)).step

    assert step(training={"gradient_checkpointing": True}) < step()
    assert step(training={"max_length": 32}) < step()
    assert step(training={"per_device_train_batch_size": 16}) > step()
    # On a CPU larger batches are computed in parts, and no row is longer than what the model was built for.
    assert step(training={"per_device_train_batch_size": 64}) == step(training={"per_device_train_batch_size": 16})
    assert step(training={"max_length": 4096}) == step(training={"max_length": 256})
    assert step(stage="dpo", data={"columns": {}}) > step()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a safetensors file"),
        ((1 << 40).to_bytes(8, "little"), "a header of 1099511627776 bytes"),
        ((2).to_bytes(8, "little") + b"[1", "not a safetensors file"),
        ((11).to_bytes(8, "little") + b'{"name": 1}', "says nothing of the shape of name"),
    ],
)
def test_a_damaged_file_is_told(make_recipe: MakeRecipe, tmp_path: Path, content: bytes, reason: str) -> None:
    model_of("llama", 2, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        estimated_memory(make_recipe(model={"name_or_path": str(tmp_path)}))


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"stage": "ppo", "rollout": {"reward_function": "a.py:f"}}, "answers of its own"),
        ({"deepspeed": {"processes": 2}}, "a deepspeed group"),
        ({"model": {"name_or_path": "nowhere"}}, "no model is in nowhere"),
        ({"model": {"attn_implementation": "eager"}}, "of sdpa alone, not of eager"),
        ({"tuning": {"mode": "vera"}}, "what tuning.mode vera takes"),
        ({"training": {"optim": "stable_adamw"}}, "the moments of training.optim stable_adamw"),
        ({"training": {"torch_compile": True}}, "a compiled model"),
    ],
)
def test_what_cannot_be_told_is_said(make_recipe: MakeRecipe, sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        estimated_memory(make_recipe(**sections))


def test_experts_and_unknown_widths_are_not_guessed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for config, reason in (({"num_local_experts": 8}, "have experts"), ({"model_type": "mamba"}, "type mamba")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=reason):
            estimated_memory(make_recipe(model={"name_or_path": str(tmp_path)}))
