"""PEFT keeps to what we lean on besides its documentation: names of tensors, what is shared, what it does to a base."""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from tests.contracts.leaning import leans, look_up, names
from tests.contracts.tiny_models import classifier, gpt2, llama, tokens

NAMES = {
    "core_training/tuning/lora.py": [
        "peft.tuners.lora:LoraLayer.get_base_layer",
        "peft:LoraConfig",
    ],
    "core_training/models/heads.py": ["peft:PeftModel.get_base_model"],
    "core_training/models/loading.py": ["peft.tuners.lora:LoraModel.merge_and_unload"],
}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("file", "name"), names(NAMES), ids=str)
def test_a_name_is_where_it_was(file: str, name: str) -> None:
    look_up(file, name)


def tuned(model: Any, **settings: Any) -> Any:
    """The model with adapters, as core_training/tuning/lora.py asks for them."""
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(model, LoraConfig(**config))


def trained(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def noisy(model: Any) -> Any:
    """The model with adapters that do something."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    return model


# --- names


@leans("core_training/models/parameters.py", "core_training/runs/result_format.py")
@pytest.mark.parametrize(
    ("settings", "files"),
    [
        (
            {"use_dora": True, "modules_to_save": ["model.norm"]},
            {
                f"{LAYER}.lora_A.default.weight": f"{LAYER}.lora_A.weight",
                f"{LAYER}.lora_B.default.weight": f"{LAYER}.lora_B.weight",
                f"{LAYER}.lora_magnitude_vector.default.weight": f"{LAYER}.lora_magnitude_vector",
                "base_model.model.model.norm.modules_to_save.default.weight": "base_model.model.model.norm.weight",
            },
        ),
        (
            {"target_modules": ["embed_tokens"]},
            {
                f"base_model.model.model.embed_tokens.lora_embedding_{factor}.default": (
                    f"base_model.model.model.embed_tokens.lora_embedding_{factor}"
                )
                for factor in "AB"
            },
        ),
    ],
    ids=["dora", "embedding"],
)
def test_what_is_trained_goes_by_these_names_in_a_model_and_in_its_files(
    tmp_path: Path, settings: dict[str, Any], files: dict[str, str]
) -> None:
    model = tuned(llama(num_hidden_layers=1), **settings)
    assert set(trained(model)) == set(files)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(files.values())
    assert (tmp_path / "adapter_config.json").is_file()


@leans("core_training/models/export.py", "core_training/models/results.py")
def test_a_configuration_is_plain_but_for_sets_and_enumerations(tmp_path: Path) -> None:
    model = tuned(llama(), modules_to_save=["model.norm"], use_rslora=True)
    assert list(model.peft_config) == ["default"]
    config = model.peft_config["default"].to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain))
    assert {"r", "lora_alpha", "init_lora_weights", "base_model_name_or_path", "inference_mode"} <= plain.keys()
    assert LoraConfig.from_pretrained(tmp_path).to_dict() == config


@leans("core_training/models/heads.py", "core_training/models/loading.py", "core_training/models/export.py")
def test_a_tuned_model_has_a_peft_config_and_one_that_was_merged_has_none() -> None:
    base = llama()
    model = tuned(base)
    assert hasattr(model, "peft_config")
    assert model.get_base_model() is base
    merged = model.merge_and_unload()
    assert merged is base
    assert not hasattr(merged, "peft_config")
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())


@leans("core_training/models/heads.py", "core_training/models/parameters.py")
def test_a_head_that_is_added_inside_is_trained_under_a_plain_name() -> None:
    model = tuned(llama())
    model.get_base_model().value_head = nn.Linear(16, 1)
    assert {name for name in trained(model) if "lora_" not in name} == {
        "base_model.model.value_head.weight",
        "base_model.model.value_head.bias",
    }


# --- what is trained


@leans("core_training/tuning/lora.py", "core_training/models/heads.py")
def test_the_score_of_a_classifier_is_trained_whole_without_being_named(tmp_path: Path) -> None:
    class Head(nn.Linear):  # type: ignore[misc]
        pass

    made = classifier(llama())
    made.score = Head(16, 1, bias=False)
    model = tuned(made, task_type="SEQ_CLS")
    name = "base_model.model.score.modules_to_save.default.weight"
    assert {one for one in trained(model) if "lora_" not in one} == {name}
    assert isinstance(model.get_base_model().score.modules_to_save["default"], Head)
    model.save_pretrained(tmp_path)
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter_model.safetensors")
    trained(model)[name].data.fill_(0.0)
    ids = tokens(2, 5)
    assert not model(input_ids=ids, position_ids=torch.arange(5).repeat(2, 1), use_cache=False).logits.any()
    assert isinstance(model.merge_and_unload().score, Head)


@leans("core_training/tuning/lora.py")
def test_a_whole_name_chooses_one_module_and_a_part_of_it_more() -> None:
    assert {name for name in trained(tuned(llama(), modules_to_save=["model.norm"])) if "lora_" not in name} == {
        "base_model.model.model.norm.modules_to_save.default.weight"
    }
    more = {name for name in trained(tuned(llama(), modules_to_save=["norm"])) if "lora_" not in name}
    assert len(more) > 1, "a part of a name is the whole of it: core_training/tuning/lora.py need not write it out"


def shared(**settings: Any) -> list[Any]:
    """The trained parameters of a model's tied embeddings and output layer, at each of their places."""
    model = tuned(llama(tie_word_embeddings=True), ensure_weight_tying=True, **settings)
    places = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and ("embed_tokens" in name or "lm_head" in name)
    }
    assert any("embed_tokens" in name for name in places)
    assert any("lm_head" in name for name in places)
    return list(places.values())


@leans("core_training/tuning/lora.py", "core_training/models/parameters.py")
def test_embeddings_that_are_trained_whole_stay_one_parameter_with_the_output_layer() -> None:
    one, other = shared(modules_to_save=["model.embed_tokens"])
    assert one is other


@leans("core_training/tuning/lora.py", "core_training/models/merging.py")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_a_tied_layer_is_its_own_and_unties_the_model_when_it_is_merged(
    target: str,
) -> None:
    model = noisy(tuned(llama(tie_word_embeddings=True), target_modules=[target]))
    before = model(tokens(2, 5)).logits
    (layer,) = (module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer))
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    with pytest.warns(UserWarning, match="no longer tied"):
        whole = model.merge_and_unload()
    assert whole.config.tie_word_embeddings is False
    assert (whole(tokens(2, 5)).logits - before).abs().max() < 1e-5


@leans("core_training/models/precision.py")
def test_adapters_on_a_bfloat16_model_are_float32() -> None:
    model = tuned(llama().bfloat16())
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


# --- what it computes


@leans("core_training/models/precision.py")
def test_a_forward_that_is_set_on_the_model_inside_is_the_one_that_runs() -> None:
    model = tuned(llama())
    inner = model.get_base_model()
    calls: list[None] = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return type(self).forward(self, *args, **kwargs)

    inner.forward = MethodType(forward, inner)
    model(input_ids=tokens(1, 4))
    assert len(calls) == 1


@leans("core_training/models/results.py", "core_training/models/loading.py")
@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_the_scale_is_alpha_over_the_rank_or_over_its_root(rslora: bool, scale: float) -> None:
    model = noisy(tuned(llama(), use_rslora=rslora))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ expected.T)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, expected)


@leans("core_training/tuning/lora.py", "core_training/models/results.py", "core_training/models/base_model.py")
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_out_of_the_bases_weights_is_taken_out_of_the_base(start: str, rslora: bool) -> None:
    before = llama().model.layers[0].self_attn.q_proj.weight.detach().clone()
    layer = tuned(llama(), init_lora_weights=start, use_rslora=rslora).get_base_model().model.layers[0].self_attn.q_proj
    change = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert change.detach().abs().max() > 0.1
    torch.testing.assert_close(layer.base_layer.weight + change, before)
    again = tuned(llama(), init_lora_weights=start, use_rslora=rslora).get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(again.base_layer.weight, layer.base_layer.weight), "two sites would start from other bits"


@leans("core_training/tuning/lora.py")
def test_a_rank_above_the_matrix_own_gives_smaller_factors_and_no_error() -> None:
    model = tuned(llama(), r=20, init_lora_weights="pissa", target_modules=["k_proj"])
    factors = {name: parameter for name, parameter in trained(model).items() if "lora_A" in name}
    assert {parameter.shape[0] for parameter in factors.values()} == {8}


@leans("core_training/tuning/lora.py")
def test_an_adapted_layer_is_a_lora_layer_around_the_layer_that_was_there() -> None:
    from transformers.pytorch_utils import Conv1D

    model = tuned(gpt2(), target_modules=["c_attn", "wte", "lm_head"], fan_in_fan_out=True)
    kinds = {type(module.get_base_layer()) for module in model.modules() if isinstance(module, LoraLayer)}
    assert kinds == {Conv1D, nn.Embedding, nn.Linear}


@leans("core_training/tuning/qlora.py")
def test_a_layer_that_is_put_in_the_place_of_the_adapted_one_is_computed_with_and_not_changed() -> None:
    model = noisy(tuned(llama()))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert dict(layer.named_children())["base_layer"] is layer.get_base_layer()
    adapter = layer(torch.eye(16)) - layer.base_layer(torch.eye(16))
    other = nn.Linear(16, 16, bias=False).requires_grad_(False)
    layer.base_layer = other
    assert layer.get_base_layer() is other
    torch.testing.assert_close(layer(torch.eye(16)) - other(torch.eye(16)), adapter, atol=1e-5, rtol=1e-4)


@leans("core_training/engine/preparation.py", "core_training/models/heads.py")
def test_adapters_have_the_same_gradients_when_activations_are_computed_again() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = noisy(tuned(llama())).train()
        if checkpointing:
            model.get_base_model().disable_input_require_grads()
            model.activation_checkpointing_enable()
        model(input_ids=tokens(2, 6), use_cache=False).logits.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in trained(model).items()})
    assert all(gradient is not None and gradient.any() for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


# --- what it refuses


@leans("core_training/tuning/lora.py")
@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"modules_to_save": ["model.layers"], "target_modules": ["embed_tokens"]}, TypeError, "ModuleList"),
        ({"modules_to_save": ["q_proj"]}, ValueError, "No modules were targeted"),
        ({"target_modules": ["nowhere"]}, ValueError, "not found in the base model"),
        ({"target_modules": ["norm"]}, ValueError, "is not supported"),
    ],
)
def test_modules_that_cannot_be_adapted_are_told_apart(
    settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        tuned(llama(), **settings)
