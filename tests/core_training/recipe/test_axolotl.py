"""axolotl's common keys mean here what they mean there, and what has no counterpart is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from core_training.foundation.errors import InputError
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe

USUAL: dict[str, Any] = {
    **{"base_model": "models/base", "model_type": "LlamaForCausalLM", "tokenizer_type": "AutoTokenizer"},
    **{"load_in_8bit": False, "load_in_4bit": True, "strict": False, "adapter": "qlora", "lora_model_dir": None},
    **{"datasets": [{"path": "data/notes.jsonl", "type": "alpaca"}], "dataset_prepared_path": None},
    **{"val_set_size": 0.05, "output_dir": "out", "sequence_len": 4096, "sample_packing": True},
    **{"pad_to_sequence_len": True, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True},
    **{"wandb_project": None, "wandb_entity": None, "gradient_accumulation_steps": 4, "micro_batch_size": 2},
    **{"num_epochs": 4, "optimizer": "paged_adamw_32bit", "lr_scheduler": "cosine", "learning_rate": 2e-4},
    **{"bf16": "auto", "tf32": False, "gradient_checkpointing": True, "resume_from_checkpoint": None},
    **{"logging_steps": 1, "flash_attention": True, "warmup_steps": 10, "evals_per_epoch": 4, "saves_per_epoch": 1},
    **{"weight_decay": 0.0, "special_tokens": {"pad_token": "<pad>"}, "deepspeed": None, "fsdp": None},
}
"""What its own examples have in common."""


def recipe_of(**keys: Any) -> Recipe:
    return parse_recipe(yaml.safe_dump({**USUAL, **keys}), source="axolotl.yml")


def test_a_usual_file_is_a_recipe(caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_of()
    assert (recipe.stage, recipe.tuning.mode, recipe.model.dtype) == ("sft", "qlora", "bfloat16")
    assert (recipe.tuning.lora.r, recipe.tuning.lora.lora_alpha, recipe.tuning.lora.lora_dropout) == (32, 16, 0.05)
    assert recipe.tuning.lora.target_modules == "all-linear"
    assert recipe.data.train == ["data/notes.jsonl"]
    training = recipe.training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.seed) == (2, 4, 42)
    assert (training.max_length, training.packing, training.optim) == (4096, True, "paged_adamw_32bit")
    assert (training.warmup_steps, training.logging_steps, training.gradient_checkpointing) == (10, 1, True)
    (line,) = caplog.messages
    assert line.startswith("axolotl.yml: axolotl's keys. flash_attention: ")
    assert "saves_per_epoch" in line.partition("without effect here: ")[2]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"adapter": "lora", "load_in_4bit": False}, {"tuning": {"mode": "lora"}}),
        ({"adapter": None, "load_in_4bit": False}, {"tuning": {"mode": "full"}}),
        (
            {"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]},
            {"tuning": {"lora": {"target_modules": ["q_proj", "v_proj"]}}},
        ),
        ({"rl": "dpo", "rl_beta": 0.2}, {"stage": "dpo", "dpo": {"beta": 0.2}}),
        ({"rl": "ipo"}, {"stage": "dpo", "dpo": {"loss_type": "ipo"}}),
        ({"rl": "dpo", "dpo_beta": 0.3, "dpo_label_smoothing": 0.1}, {"dpo": {"beta": 0.3, "label_smoothing": 0.1}}),
        ({"rl": "dpo", "dpo_norm_loss": True}, {"dpo": {"loss_type": "sigmoid_norm"}}),
        ({"rl": "dpo", "dpo_loss_type": ["hinge"]}, {"dpo": {"loss_type": "hinge"}}),
        (
            {"optimizer": "ademamix", "optim_args": {"alpha": 8, "beta3": 0.99}},
            {"training": {"optim_args": "alpha=8,beta3=0.99"}},
        ),
        ({"optimizer": "sgd", "optim_args": "momentum=0.9"}, {"training": {"optim_args": "momentum=0.9"}}),
        ({"lora_model_dir": "runs/first"}, {"model": {"adapters": ["runs/first"]}}),
        ({"early_stopping_patience": 3}, {"topology": {"early_stopping_patience": 3}}),
        ({"loss_watchdog_threshold": 5.0, "loss_watchdog_patience": 3, "unfrozen_parameters": []}, {}),
        ({"chat_template": "qwen_25"}, {"model": {"chat_template": "qwen2_5"}}),
        ({"chat_template": "tokenizer_default_fallback_phi_35"}, {"model": {"chat_template": "phi3_5"}}),
        (
            {"rl": "kto", "micro_batch_size": 1, "gradient_accumulation_steps": 4},
            {"training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
        ),
        ({"rl": "simpo", "simpo_gamma": 0.7}, {"simpo": {"gamma": 0.7}}),
        ({"datasets": [{"path": "t.jsonl", "type": "completion"}]}, {"stage": "pretrain"}),
        (
            {"datasets": [{"path": "O/N", "name": "c", "split": "half", "type": "chat_template"}]},
            {"data": {"train": ["O/N/c:half"]}},
        ),
        ({"train_on_inputs": True}, {"data": {"loss_on": "all"}}),
        ({"chat_template": "llama3"}, {"model": {"chat_template": "llama3"}}),
        ({"chat_template": "tokenizer_default"}, {"model": {"chat_template": None}}),
        ({"warmup_steps": None, "warmup_ratio": 0.1}, {"training": {"warmup_ratio": 0.1}}),
        ({"warmup_steps": 0.1}, {"training": {"warmup_ratio": 0.1, "warmup_steps": 0}}),
        ({"use_tensorboard": True}, {"training": {"report_to": ["tensorboard"]}}),
    ],
)
def test_a_key_says_here_what_it_says_there(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    def contains(whole: Any, part: Any) -> bool:
        if not isinstance(part, dict):
            return bool(whole == part)
        return all(contains(whole[key], value) for key, value in part.items())

    assert contains(recipe_of(**keys).model_dump(), expected)


def test_an_eos_token_is_the_models_own(tiny_model: Path) -> None:
    own = AutoTokenizer.from_pretrained(tiny_model).eos_token
    assert recipe_of(base_model=str(tiny_model), special_tokens={"eos_token": own, "pad_token": "<x>"})
    with pytest.raises(InputError, match=f"special_tokens: .*no eos_token but the model's own, {re.escape(own)}"):
        recipe_of(base_model=str(tiny_model), special_tokens={"eos_token": "<other>"})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rl": "grpo"}, "rl: 'grpo' has no counterpart here; it can be sft, dpo, ipo, kto, orpo, simpo"),
        ({"adapter": "llama-adapter"}, "adapter: 'llama-adapter' has no counterpart"),
        ({"datasets": []}, "datasets: name a file"),
        ({"datasets": [{"path": "x", "type": "user_defined"}]}, "datasets: type 'user_defined' has no counterpart"),
        ({"lr_scheduler": "rex"}, "lr_scheduler: rex (here: cosine"),
        ({"val_set_size": 100}, "val_set_size: 100 (here: a share below 1"),
        ({"save_steps": 0.25}, "save_steps: must be a whole number of steps, as a share of all steps would move when"),
        ({"load_in_8bit": True, "adapter": "lora"}, "load_in_8bit: True (here: four bits, under adapter qlora, are"),
        ({"eot_tokens": ["<|end|>"]}, "eot_tokens: ['<|end|>'] (here: the chat template says which tokens end an"),
        (
            {"unfrozen_parameters": ["^lm_head"]},
            "unfrozen_parameters: ['^lm_head'] (here: a recipe's tuning.mode freeze",
        ),
        ({"special_tokens": {"eos_token": "</s>"}}, "(here: no eos_token but the model's own, which is not here to"),
        ({"rl": "dpo", "dpo_loss_type": ["sigmoid", "ipo"]}, "dpo_loss_type: ['sigmoid', 'ipo'] (here: one of them)"),
        ({"rl": "dpo", "dpo_use_weighting": True}, "dpo_use_weighting: True"),
        ({"bf16": "yes please"}, "bf16: must be one of True, False, auto, full"),
        ({"fsdp": ["full_shard"], "spectrum_top_fraction": 0.5}, "fsdp: ['full_shard']; spectrum_top_fraction"),
    ],
)
def test_what_cannot_be_done_is_named(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe_of(**keys)
    assert str(caught.value).startswith("axolotl.yml: ")
    assert expected in str(caught.value)
