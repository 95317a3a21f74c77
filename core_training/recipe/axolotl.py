"""axolotl's YAML as a recipe: its common keys, and a word for each other one.

A key without a counterpart is never dropped in silence: one that would change the training is an error, one that would
not is named in a line on standard error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from core_training.foundation.bounded_reading import ForeignTextError, read_json
from core_training.foundation.errors import InputError
from core_training.foundation.hub_models import find_model
from core_training.foundation.model_files import LARGEST_SMALL_FILE
from core_training.recipe.flat_reader import FlatReader, rows_in_twos
from core_training.recipe.sections.training import TrackerName

_STAGES = {"sft": "sft", "dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}
_LAYOUTS = ("alpaca", "chat_template", "sharegpt", "completion", "pretrain", "input_output", "chatml", "llama3")
_OWN_SCHEDULES = ("rex", "one_cycle", "log_sweep")

_WITHOUT_EFFECT = re.compile(
    "^("
    # how fast it goes, what is shown and saved
    "model_type|tokenizer_type|base_model_config|trust_remote_code|strict|is_.*_derived_model|"
    "pad_to_sequence_len|dataset_prepared_path|dataset_processes|dataset_num_proc|dataset_keep_in_memory|"
    "eval_sample_packing|eval_batch_size|eval_table_size|eval_max_new_tokens|save_safetensors|save_total_limit|"
    "save_only_model|save_strategy|eval_strategy|saves_per_epoch|evals_per_epoch|wandb_.*|mlflow_.*|comet_.*|"
    "hub_.*|group_by_length|gradient_checkpointing_kwargs|tf32|local_rank|debug|ddp_.*|"
    "auto_resume_from_checkpoints|lora_fan_in_fan_out|plugins|loss_watchdog_.*|"
    "liger_rms_norm|liger_glu_activation|liger_rope|liger_layer_norm|liger_fused_linear_cross_entropy|"
    "lora_mlp_kernel|lora_qkv_kernel|lora_o_kernel|dataloader_.*|use_tensorboard|use_wandb|use_mlflow|"
    # of another adapter or objective: where one is of use, it has been read
    "lora_.*|peft_use_.*|rl_beta|orpo_alpha|kto_.*|cpo_alpha|simpo_gamma|dpo_.*"
    ")$"
)
_WHEN_OFF: dict[str, Any] = {
    "train_on_inputs": False,
    "fp16": False,
    "float16": False,
    "xformers_attention": False,
    "s2_attention": False,
    "resume_from_checkpoint": None,
    "lora_on_cpu": None,
    "fsdp": None,
    "fsdp_config": None,
    "resize_token_embeddings_to_32x": False,
    "shuffle_merged_datasets": True,
    "dpo_use_weighting": False,
    "dpo_loss_weights": None,
}
_REFUSED = {
    "eot_tokens": "the chat template says which tokens end an answer",
    "unfrozen_parameters": "a recipe's tuning.mode freeze, which takes layers by their place and modules by name",
}
"""Lists that have no counterpart, and what there is in their place."""
_TEMPLATES = {"qwen_25": "qwen2_5", "phi_3": "phi3", "phi_35": "phi3_5"}
"""Chat templates that are called otherwise here."""


def is_axolotl(document: Any) -> bool:
    """Whether a YAML document is axolotl's rather than a recipe."""
    return isinstance(document, dict) and "base_model" in document


def to_recipe(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The recipe that an axolotl YAML stands for, axolotl's defaults where it is silent.

    `source` names the file in messages. Raises InputError naming all keys that change the training and have no
    counterpart here; prints one line that names those without effect here.
    """
    read = FlatReader(document, source, "axolotl")
    kind = read.one_of("rl", _STAGES, "sft")
    data, stage = _data(read, kind)
    recipe: dict[str, Any] = {
        "model": _model(read),
        "stage": stage,
        "tuning": _tuning(read),
        "data": data,
        "training": _training(read, stage),
        "output": read.text("output_dir", "model-out"),
        **_objective(read, stage, document.get("rl")),
    }
    if read.given("early_stopping_patience"):
        recipe["topology"] = {"early_stopping_patience": read.whole("early_stopping_patience", 1)}
    for key, right in _REFUSED.items():
        if read.names(key):
            read.refuse(key, right)
    if (config := read.text("deepspeed", None)) is not None:
        recipe["deepspeed"] = {"config": config}
    read.finish(_WHEN_OFF, _WITHOUT_EFFECT)
    return recipe


def _model(read: FlatReader) -> dict[str, Any]:
    name, revision = read.text("base_model", ""), read.text("revision_of_model", None)
    model: dict[str, Any] = {"name_or_path": name if revision is None else f"{name}@{revision}"}
    if read.choice("bf16", (True, False, "auto", "full"), default=False) or read.switch("bfloat16", default=False):
        model["dtype"] = "bfloat16"
    if read.switch("flash_attention", default=False):
        read.say("flash_attention: transformers chooses; set model.attn_implementation")
    if (attention := read.text("attn_implementation", None)) is not None:
        model["attn_implementation"] = attention
    template = read.text("chat_template", None)
    if template not in (None, "tokenizer_default"):
        template = template.removeprefix("tokenizer_default_fallback_")
        model["chat_template"] = _TEMPLATES.get(template, template)
    if adapters := read.names("lora_model_dir"):
        model["adapters"] = adapters
        read.say("lora_model_dir: merged into the base, and a new adapter is trained")
    eos = (read.mapping("special_tokens") or {}).get("eos_token")
    if eos not in (None, own := _own_eos(model["name_or_path"])):
        read.refuse("special_tokens", f"no eos_token but the model's own, {own or 'which is not here to be compared'}")
    return model


def _own_eos(name: str) -> str | None:
    """The token that ends a sequence of the model with this name; None where that is not to be found here."""
    if (folder := find_model(name)) is None:
        return None
    try:
        token = read_json(folder / "tokenizer_config.json", LARGEST_SMALL_FILE)["eos_token"]
        own = token["content"] if isinstance(token, dict) else token
    except (OSError, ForeignTextError, KeyError, TypeError):
        return None
    return own if isinstance(own, str) else None


def _tuning(read: FlatReader) -> dict[str, Any]:
    adapter = read.one_of("adapter", {"lora": "lora", "qlora": "qlora", "none": "full"}, "none")
    if read.switch("load_in_4bit", default=adapter == "qlora") and adapter == "lora":
        adapter = "qlora"
    if read.switch("load_in_8bit", default=False):
        read.refuse("load_in_8bit", "four bits, under adapter qlora, are what there is")
    if adapter == "full":
        return {"mode": "full"}
    targets = read.names("lora_target_modules")
    lora: dict[str, Any] = {
        "r": read.whole("lora_r", 8),
        "lora_alpha": read.whole("lora_alpha", 16),
        "lora_dropout": read.number("lora_dropout", 0.0),
        "target_modules": "all-linear" if read.switch("lora_target_linear", default=not targets) else targets,
        "modules_to_save": read.names("lora_modules_to_save"),
        "use_dora": read.switch("peft_use_dora", default=False),
        "use_rslora": read.switch("peft_use_rslora", default=False),
    }
    if read.given("loraplus_lr_ratio"):
        lora["loraplus_lr_ratio"] = read.number("loraplus_lr_ratio", 0.0)
    return {"mode": adapter, "lora": lora}


def _data(read: FlatReader, stage: str) -> tuple[dict[str, Any], str]:
    """The section `data`, and the stage: plain texts are for pre-training."""
    sets = read.records("datasets")
    if not sets:
        raise InputError(f"{read.source}: datasets: name a file, or a data set of the hub, by its path")
    data: dict[str, Any] = {"train": [_place(read, entry) for entry in sets]}
    if held_out := read.records("test_datasets"):
        data["eval"] = [_place(read, entry) for entry in held_out]
    share = read.number("val_set_size", 0.0)
    if share >= 1:
        read.refuse("val_set_size", "a share below 1, as the evaluation records are chosen one by one")
    else:
        data["eval_fraction"] = share
    kinds = {str(entry.get("type", "alpaca")).partition(".")[0] for entry in sets}
    texts = kinds <= {"completion", "pretrain"}
    if stage == "sft" and texts:
        return data, "pretrain"
    if stage == "sft" and read.switch("train_on_inputs", default=False):
        data["loss_on"] = "all"
    return data, stage


def _place(read: FlatReader, entry: Mapping[str, Any]) -> str:
    path, kind = entry.get("path"), str(entry.get("type", "alpaca"))
    if not isinstance(path, str):
        raise InputError(f"{read.source}: datasets: each needs a path, a file's or a data set's on the hub")
    if kind.partition(".")[0] not in _LAYOUTS:
        raise InputError(
            f"{read.source}: datasets: type '{kind}' has no counterpart here; records are read by their columns "
            f"(docs/data.md), which stands for {', '.join(_LAYOUTS)}"
        )
    if unknown := sorted(set(entry) - {"path", "type", "ds_type", "split", "name", "data_files", "chat_template"}):
        read.say(f"datasets: {path}: {', '.join(unknown)}: records are read by their columns (docs/data.md)")
    place = path if entry.get("name") is None else f"{path}/{entry['name']}"
    return place if entry.get("split") in (None, "train") else f"{place}:{entry['split']}"


def _training(read: FlatReader, stage: str) -> dict[str, Any]:
    schedule = read.text("lr_scheduler", "cosine")
    if schedule in _OWN_SCHEDULES:
        read.refuse("lr_scheduler", "cosine, linear, constant or another of transformers'")
    training: dict[str, Any] = {
        "learning_rate": read.number("learning_rate", 2e-4),
        "per_device_train_batch_size": read.whole("micro_batch_size", 1),
        "gradient_accumulation_steps": read.whole("gradient_accumulation_steps", 1),
        "max_length": read.whole("sequence_len", 2048),
        "num_train_epochs": read.number("num_epochs", 1.0),
        "optim": read.text("optimizer", "adamw_torch_fused"),
        "lr_scheduler_type": schedule,
        "weight_decay": read.number("weight_decay", 0.0),
        "max_grad_norm": read.number("max_grad_norm", 1.0),
        "seed": read.whole("seed", 42),
        "gradient_checkpointing": bool(
            read.choice("gradient_checkpointing", (True, False, "unsloth", "offload"), default=False)
        ),
        "report_to": _trackers(read),
    }
    if stage == "kto":
        rows_in_twos(training, read, "micro_batch_size")
    for key, number in (
        ("max_steps", read.whole),
        ("warmup_steps", read.steps_or_share),
        *((key, read.steps) for key in ("logging_steps", "save_steps", "eval_steps")),
    ):
        if read.given(key):
            training[key] = number(key, 0)
    for key in ("warmup_ratio", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha"):
        if read.given(key):
            training[key] = read.number(key, 0.0)
    if (arguments := read.arguments("optim_args")) is not None:
        training["optim_args"] = arguments
    if read.switch("torch_compile", default=False):
        training["torch_compile"] = True
    if read.switch("load_best_model_at_end", default=False):
        training["load_best_model_at_end"] = True
    packing = read.switch("sample_packing", default=False)
    if stage in ("sft", "pretrain"):
        training["packing"] = packing
    return training


def _trackers(read: FlatReader) -> list[str]:
    """The trackers that a run is told to by a switch, or by a project's name."""
    told = {name: read.switch(f"use_{name}", default=False) for name in get_args(TrackerName)}
    return [name for name, on in told.items() if on or read.given(f"{name}_project")]


def _objective(read: FlatReader, stage: str, rl: Any) -> dict[str, Any]:
    """The stage's own section."""
    beta = read.number("rl_beta", read.number("dpo_beta", 0.1))
    if stage == "dpo":
        by_length = read.switch("dpo_norm_loss", default=False)
        losses = read.names("dpo_loss_type") or ["ipo" if rl == "ipo" else "sigmoid_norm" if by_length else "sigmoid"]
        if len(losses) > 1:
            read.refuse("dpo_loss_type", "one of them")
        smoothing = read.number("dpo_label_smoothing", 0.0)
        return {"dpo": {"beta": beta, "loss_type": losses[0], "label_smoothing": smoothing}}
    if stage == "orpo":
        return {"orpo": {"beta": read.number("orpo_alpha", 0.1)}}
    if stage == "simpo":
        return {"simpo": {"beta": beta, "gamma": read.number("simpo_gamma", 0.5)}}
    if stage == "kto":
        weights = {"desirable_weight": "kto_desirable_weight", "undesirable_weight": "kto_undesirable_weight"}
        return {"kto": {"beta": beta, **{here: read.number(key, 1.0) for here, key in weights.items()}}}
    return {}
