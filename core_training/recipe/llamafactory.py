"""LLaMA-Factory's flat YAML as a recipe.

What a key means here is in the tables below. A key without a counterpart is never dropped in silence: one
that would change the training is an error, one that would not is named in a line on standard error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from core_training.foundation.errors import InputError
from core_training.recipe.flat_reader import FlatReader, rows_in_twos
from core_training.recipe.llamafactory_data import INFO_FILE
from core_training.recipe.sections.training import TrackerName


def is_flat_yaml(document: Any) -> bool:
    """Whether a YAML document is LLaMA-Factory's rather than a recipe."""
    return isinstance(document, dict) and ("model_name_or_path" in document or "finetuning_type" in document)


def to_recipe(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The recipe that a flat YAML stands for, LLaMA-Factory's defaults where it is silent.

    `source` names the file in messages. Raises InputError naming all keys that change the training and have no
    counterpart here; prints one line that names those without effect here.
    """
    reader = FlatReader(document, source, "LLaMA-Factory")
    recipe = _recipe(reader)
    reader.finish(_WHEN_OFF, _WITHOUT_EFFECT)
    return recipe


_STAGES = {"pt": "pretrain", "sft": "sft", "rm": "reward", "ppo": "ppo", "dpo": "dpo", "kto": "kto"}
_PREFERENCE_LOSSES = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo"}

_ATTENTION = {
    "auto": "auto",
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}

_WITHOUT_EFFECT = re.compile(
    "^("
    # what is shown, saved, checked on the way, and how fast it goes
    "logging_.*|log_.*|run_name|plot_loss|disable_tqdm|print_param_status|(use_)?swanlab.*|"
    "overwrite_.*|preprocessing_.*|dataloader_num_workers|dataloader_p.*|ddp_.*|data_shared_file_system|streaming|"
    "buffer_size|remove_unused_columns|low_cpu_mem_usage|use_fast_tokenizer|cache_dir|.*_hub_token|"
    "trust_remote_code|use_unsloth_gc|use_(kv_)?cache|use_v1_kernels|offload_folder|infer_.*|vllm_.*|sglang_.*|"
    "use_reentrant_gc|"
    "export_.*|do_eval|eval_.*|evaluation_strategy|batch_eval_metrics|compute_accuracy|metric_for_best_model|"
    "greater_is_better|save_strategy|save_total_limit|save_only_model|save_safetensors|include_.*|local_rank|"
    "torch_compile_.*|gradient_checkpointing_kwargs|resources_per_worker|placement_strategy|tf32|ray_.*|disable_version_checking|generation_.*|pissa_.*|create_new_adapter|"
    # of another stage or tuning mode: where one is of use, it has been read
    "template|lora_.*|use_rslora|use_dora|additional_target|quantization_.*|double_quantization|freeze_.*|pref_.*|"
    "simpo_.*|kto_.*|ppo_.*|reward_model.*|max_new_tokens|max_length|temperature|top_p|top_k|do_sample|num_beams|"
    # settings of what is off wherever there is a recipe
    "fp8_.*|kt_.*|cpu_infer|chunk_size"
    ")$"
)
"""Keys that change nothing in what is learnt, or nothing here."""

_WHEN_OFF = {
    "resize_vocab": False,
    "predict_with_generate": False,
    "do_predict": False,
    "ppo_buffer_size": 1,
    "ppo_score_norm": False,
    "fp16": False,
    "upcast_layernorm": False,
    "upcast_lmhead_output": False,
    "train_from_scratch": False,
    "init_special_tokens": "noise_init",
    "split_special_tokens": False,
    "shift_attn": False,
    "mixture_of_depths": None,
    "rope_scaling": None,
    "use_unsloth": False,
    "mix_strategy": "concat",
    "enable_thinking": True,
    "ignore_pad_token_for_loss": True,
    "resume_from_checkpoint": None,
    "group_by_length": False,
    "dataloader_drop_last": False,
    "push_to_hub": False,
    "auto_find_batch_size": False,
    "label_smoothing_factor": 0.0,
    "pref_ftx": 0.0,
    "pref_bco_weight": 0.0,
    "dpo_label_smoothing": 0.0,
    "ref_model": None,
    "use_galore": False,
    "use_apollo": False,
    "use_badam": False,
    "use_muon": False,
    "use_adam_mini": False,
    "use_llama_pro": False,
    "use_mca": False,
    "fp8": False,
    "use_asft_loss": False,
    "use_dft_loss": False,
    "fsdp": "",
    "do_train": True,
}
"""Keys without a counterpart, and the value that asks for nothing which is not done here anyway."""


def _recipe(read: FlatReader) -> dict[str, Any]:
    stage = read.one_of("stage", _STAGES, "sft")
    if stage == "dpo":
        stage = read.one_of("pref_loss", _PREFERENCE_LOSSES, "sigmoid")
    mode = _tuning_mode(read)
    recipe: dict[str, Any] = {
        "model": _model(read, stage),
        "stage": stage,
        "tuning": _tuning(read, mode),
        "data": _data(read, stage),
        "training": _training(read, stage),
        "output": read.text("output_dir", "saves"),
    }
    if read.given("early_stopping_steps"):
        recipe["topology"] = {"early_stopping_patience": read.whole("early_stopping_steps", 1)}
    if read.switch("use_kt", default=False):
        read.refuse("use_kt", "no KTransformers; a large model's weights fit by quantization_bit: 4, or by deepspeed")
    if (config := read.text("deepspeed", None)) is not None:
        recipe["deepspeed"] = {"config": config}
    return recipe | _objective(read, stage)


def _tuning_mode(read: FlatReader) -> str:
    mode = read.one_of("finetuning_type", {"lora": "lora", "full": "full", "freeze": "freeze"}, "lora")
    bits = read.whole("quantization_bit", None)
    if bits is None:
        return mode
    if bits != 4 or mode != "lora":
        read.refuse("quantization_bit", "four bits, under finetuning_type lora, are what there is")
    method = read.text("quantization_method", "bnb")
    if method not in ("bnb", "bitsandbytes"):
        read.refuse("quantization_method", "it can be bnb")
    return "qlora"


def _model(read: FlatReader, stage: str) -> dict[str, Any]:
    if (folder := read.text("model_name_or_path", None)) is None:
        raise InputError(f"{read.source}: model_name_or_path: name the base model's folder, or its name on the hub")
    revision = read.text("model_revision", "main")
    if revision != "main" and not Path(folder).is_dir():
        folder = f"{folder}@{revision}"
    model: dict[str, Any] = {"name_or_path": folder}
    attention = read.one_of("flash_attn", _ATTENTION, "auto")
    if attention != "auto":
        model["attn_implementation"] = attention
    if (balance := read.number("moe_aux_loss_coef", 0.0)) and stage not in ("pretrain", "sft"):
        read.refuse("moe_aux_loss_coef", "it is for the stages pt and sft")
    elif balance:
        model["router_aux_loss_coef"] = balance
    bf16, pure = read.switch("bf16", default=False), read.switch("pure_bf16", default=False)
    if bf16 or pure:
        model["dtype"] = "bfloat16"
    if tokens := [*read.names("add_tokens"), *read.names("add_special_tokens")]:
        model["add_tokens"] = tokens
        read.switch("resize_vocab", default=True)  # which LLaMA-Factory does for them unasked
        read.say("add_tokens, add_special_tokens: each begins as the mean of all; those like <|this|> are special")
    if adapters := read.names("adapter_name_or_path"):
        model["adapters"] = adapters
        read.say("adapter_name_or_path: merged into the base, and a new adapter is trained")
    if stage != "pretrain" and (template := read.text("template", None)) is not None:
        read.say(f"template: the model's own chat template is used in place of '{template}'")
    return model


def _tuning(read: FlatReader, mode: str) -> dict[str, Any]:
    tuning: dict[str, Any] = {"mode": mode}
    if mode in ("lora", "qlora"):
        rank = read.whole("lora_rank", 8)
        target = read.names("lora_target") or ["all"]
        lora: dict[str, Any] = {
            "r": rank,
            "lora_alpha": read.whole("lora_alpha", 2 * rank),
            "lora_dropout": read.number("lora_dropout", 0.0),
            "target_modules": "all-linear" if target == ["all"] else target,
            "use_rslora": read.switch("use_rslora", default=False),
            "use_dora": read.switch("use_dora", default=False),
            "modules_to_save": read.names("additional_target"),
        }
        if read.given("loraplus_lr_ratio"):
            lora["loraplus_lr_ratio"] = read.number("loraplus_lr_ratio", 0.0)
        if read.switch("pissa_init", default=False):
            lora["init_lora_weights"] = "pissa"
        tuning["lora"] = lora
    if mode == "qlora":
        tuning["qlora"] = {
            "quant_type": read.text("quantization_type", "nf4"),
            "double_quant": read.switch("double_quantization", default=True),
        }
    if mode == "freeze":
        modules = read.names("freeze_trainable_modules") or ["all"]
        tuning["freeze"] = {
            "trainable_layers": read.whole("freeze_trainable_layers", 2),
            "trainable_modules": "all" if modules == ["all"] else modules,
            "extra_modules": read.names("freeze_extra_modules"),
        }
    return tuning


def _data(read: FlatReader, stage: str) -> dict[str, Any]:
    folder = read.text("dataset_dir", "data")
    if folder == "ONLINE" or folder.startswith("REMOTE:"):
        read.refuse("dataset_dir", f"a folder with {INFO_FILE} and its files, as records are not downloaded")
    most = read.whole("max_samples", None)
    part = "" if most is None else f"[:{most}]"
    data: dict[str, Any] = {"train": [f"{folder}/{INFO_FILE}:{name}{part}" for name in read.names("dataset")]}
    if not data["train"]:
        raise InputError(f"{read.source}: dataset: name a data set of {folder}/{INFO_FILE}")
    share = read.number("val_size", 0.0)
    if evaluation := read.names("eval_dataset"):
        data["eval"] = [f"{folder}/{INFO_FILE}:{name}{part}" for name in evaluation]
    elif share >= 1:
        read.refuse("val_size", "a share below 1, as the evaluation records are chosen one by one")
    else:
        data["eval_fraction"] = share
    prompts = read.switch("train_on_prompt", default=False)
    last = read.switch("mask_history", default=False)
    if prompts and last:
        read.refuse("mask_history", "one of mask_history and train_on_prompt")
    if stage == "sft" and (prompts or last):
        data["loss_on"] = "all" if prompts else "last_answer"
    if (cache := read.text("tokenized_path", None)) is not None:
        data["cache"] = cache
    return data


def _training(read: FlatReader, stage: str) -> dict[str, Any]:
    training: dict[str, Any] = {
        "learning_rate": read.number("learning_rate", 5e-5),
        "per_device_train_batch_size": read.whole("per_device_train_batch_size", 8),
        "per_device_eval_batch_size": read.whole("per_device_eval_batch_size", 8),
        "gradient_accumulation_steps": read.whole("gradient_accumulation_steps", 1),
        "max_length": read.whole("cutoff_len", 2048),
        "num_train_epochs": read.number("num_train_epochs", 3.0),
        "optim": read.text("optim", "adamw_torch"),
        "lr_scheduler_type": read.text("lr_scheduler_type", "linear"),
        "weight_decay": read.number("weight_decay", 0.0),
        "max_grad_norm": read.number("max_grad_norm", 1.0),
        "seed": read.whole("seed", 42),
        "save_steps": read.steps("save_steps", 500),
    }
    if stage == "kto":
        rows_in_twos(training, read, "per_device_train_batch_size")
    for key in ("logging_steps", "eval_steps"):
        if read.given(key):
            training[key] = read.steps(key, 1)
    if read.switch("load_best_model_at_end", default=False):
        training["load_best_model_at_end"] = True
    training["report_to"] = _trackers(read)
    steps = read.whole("max_steps", -1)
    if steps > 0:
        training["max_steps"] = steps
    ratio, warmup = read.number("warmup_ratio", 0.0), read.steps_or_share("warmup_steps", 0)
    if training["lr_scheduler_type"] == "constant":
        if ratio or warmup:
            read.say("warmup_ratio, warmup_steps: schedule constant has no warm-up")
    elif warmup:
        training["warmup_steps"] = warmup
    elif ratio:
        training["warmup_ratio"] = ratio
    if (arguments := read.arguments("optim_args")) is not None:
        training["optim_args"] = arguments
    if (settings := read.mapping("lr_scheduler_kwargs")) is not None:
        training["lr_scheduler_kwargs"] = settings
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha"):
        if read.given(key):
            training[key] = read.number(key, 0.0)
    for key, here in (("torch_compile", "torch_compile"), ("enable_liger_kernel", "use_liger_kernel")):
        if read.switch(key, default=False):
            training[here] = True
    neat = read.switch("neat_packing", default=False)
    packing = read.switch("packing", default=stage == "pretrain") or neat
    if neat or read.given("packing") or stage == "sft":  # unset, stage pt packs here too where the model can
        training["packing"] = packing
    if packing and not neat:
        read.say("packing: examples that share a row do not see each other")
    if read.given("gradient_checkpointing"):
        training["gradient_checkpointing"] = read.switch("gradient_checkpointing", default=False)
    elif read.given("disable_gradient_checkpointing"):
        training["gradient_checkpointing"] = not read.switch("disable_gradient_checkpointing", default=False)
    return training


def _trackers(read: FlatReader) -> list[str]:
    """The trackers that are named; those that are not to be had are said."""
    named = [name for name in read.names("report_to") if name != "none"]
    known = get_args(TrackerName)
    if unknown := [name for name in named if name not in known]:
        read.say(f"report_to: {', '.join(unknown)} is not to be had; the curve is in curve.jsonl")
    return [name for name in named if name in known]


def _objective(read: FlatReader, stage: str) -> dict[str, Any]:
    """The stage's own section."""
    if stage == "reward":
        return {"reward": {"center_rewards_coefficient": 0.0}}
    if stage == "dpo":
        return {
            "dpo": {
                "beta": read.number("pref_beta", 0.1),
                "loss_type": read.text("pref_loss", "sigmoid"),
                "label_smoothing": read.number("dpo_label_smoothing", 0.0),
                "sft_weight": read.number("pref_ftx", 0.0),
            }
        }
    if stage == "orpo":
        return {"orpo": {"beta": read.number("pref_beta", 0.1)}}
    if stage == "simpo":
        return {"simpo": {"beta": read.number("pref_beta", 0.1), "gamma": read.number("simpo_gamma", 0.5)}}
    if stage == "kto":
        return {
            "kto": {
                "beta": read.number("pref_beta", 0.1),
                "desirable_weight": read.number("kto_chosen_weight", 1.0),
                "undesirable_weight": read.number("kto_rejected_weight", 1.0),
            }
        }
    if stage == "ppo":
        rollout: dict[str, Any] = {
            "max_new_tokens": read.whole("max_new_tokens", 1024),
            "temperature": read.number("temperature", 0.95),
            "top_p": read.number("top_p", 0.7),
        }
        if read.text("reward_model_type", "lora") not in ("lora", "full"):
            read.refuse("reward_model_type", "lora or full, a run of stage reward")
        if read.whole("top_k", 0) > 0:
            read.refuse("top_k", "top_p")
        if read.whole("num_beams", 1) > 1:
            read.refuse("num_beams", "1, as answers are sampled")
        if (judge := read.text("reward_model", None)) is not None:
            rollout["reward_model"] = judge
        return {
            "rollout": rollout,
            "ppo": {
                "num_ppo_epochs": read.whole("ppo_epochs", 4),
                "kl_coef": 0.2,
                "kl_target": read.number("ppo_target", 6.0),
                "whiten_rewards": read.switch("ppo_whiten_rewards", default=False),
            },
        }
    return {}
