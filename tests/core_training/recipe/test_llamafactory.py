"""LLaMA-Factory's files mean here what they mean there, and what has no counterpart is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from core_training.data.formats import read_values
from core_training.data.records import content_digest, data_files, read_records
from core_training.foundation.errors import InputError
from core_training.recipe.llamafactory import is_flat_yaml, to_recipe
from core_training.recipe.reading import load_recipe, parse_recipe
from core_training.recipe.schema import Recipe
from tests import tiny

LLAMA_FACTORY = Path(__file__).parents[4] / "shared" / "data" / "llamafactory"

FLAT = """\
### model
model_name_or_path: models/base
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
max_steps: 95
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""


def recipe_of(**keys: Any) -> Recipe:
    document = {"model_name_or_path": "models/base", "dataset": "d", **keys}
    return parse_recipe(yaml.safe_dump(document), source="flat.yaml")


def error_of(**keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        recipe_of(**keys)
    assert str(caught.value).startswith("flat.yaml: ")
    return str(caught.value).removeprefix("flat.yaml: ")


def test_a_flat_yaml_is_a_recipe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "llama3_lora_sft.yaml"
    path.write_text(FLAT)
    recipe = load_recipe(path, ["training.seed=7"])
    assert recipe.model.name_or_path == "models/base"
    assert recipe.model.dtype == "bfloat16"
    assert (recipe.stage, recipe.tuning.mode) == ("sft", "lora")
    assert (recipe.tuning.lora.r, recipe.tuning.lora.lora_alpha) == (8, 16)
    assert recipe.tuning.lora.target_modules == "all-linear"
    assert recipe.data.train == [
        "data/dataset_info.json:identity[:1000]",
        "data/dataset_info.json:alpaca_en_demo[:1000]",
    ]
    assert recipe.data.eval_fraction == 0.0
    assert recipe.training.model_dump(include=set(_TRAINING)) == _TRAINING
    assert recipe.output == "saves/lora/sft"
    (line,) = caplog.messages
    assert line.startswith(f"{path}: LLaMA-Factory's keys. template: the model's own chat template is used")
    idle = line.partition("without effect here: ")[2].split(", ")
    assert set(idle) == {
        "trust_remote_code", "overwrite_cache", "preprocessing_num_workers", "dataloader_num_workers",
        "plot_loss", "overwrite_output_dir", "save_only_model", "ddp_timeout",
    }  # fmt: skip


_TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "max_steps": 95,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "max_length": 1024,
    "seed": 7,
    "save_steps": 500,
}


def test_llama_factorys_defaults_hold_where_the_file_is_silent() -> None:
    recipe = recipe_of()
    assert (recipe.stage, recipe.tuning.mode, recipe.model.dtype) == ("sft", "lora", "float32")
    training = recipe.training
    assert (training.learning_rate, training.num_train_epochs, training.max_length) == (5e-5, 3.0, 2048)
    assert (training.seed, training.max_steps, training.packing) == (42, None, False)
    assert recipe_of(stage="dpo").training.packing is None


def test_a_flat_yaml_without_a_model_is_named() -> None:
    with pytest.raises(InputError, match=r"flat\.yaml: model_name_or_path: name the base model's folder"):
        to_recipe({"finetuning_type": "lora"}, "flat.yaml")


def test_a_recipe_is_not_taken_for_a_flat_yaml() -> None:
    assert not is_flat_yaml({"model": {"name_or_path": "x"}, "stage": "sft"})
    assert not is_flat_yaml([])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"stage": "pt"}, {"stage": "pretrain", "training": {"packing": None}}),
        ({"stage": "pt", "packing": True}, {"training": {"packing": True}}),
        ({"stage": "pt", "neat_packing": True}, {"training": {"packing": True}}),
        ({"add_tokens": "<a>, <b>", "resize_vocab": True}, {"model": {"add_tokens": ["<a>", "<b>"]}}),
        (
            {"add_tokens": "<think>", "add_special_tokens": "<|x|>", "init_special_tokens": "noise_init"},
            {"model": {"add_tokens": ["<think>", "<|x|>"]}},
        ),
        ({"stage": "rm"}, {"stage": "reward", "reward": {"center_rewards_coefficient": 0.0}}),
        ({"stage": "dpo", "pref_beta": 0.3}, {"stage": "dpo", "dpo": {"beta": 0.3, "loss_type": "sigmoid"}}),
        ({"stage": "dpo", "pref_loss": "ipo", "pref_ftx": 0.5}, {"dpo": {"loss_type": "ipo", "sft_weight": 0.5}}),
        ({"stage": "dpo", "dpo_label_smoothing": 0.1}, {"dpo": {"loss_type": "sigmoid", "label_smoothing": 0.1}}),
        ({"stage": "dpo", "pref_loss": "orpo"}, {"stage": "orpo", "orpo": {"beta": 0.1}}),
        (
            {"stage": "dpo", "pref_loss": "simpo", "pref_beta": "2.5", "simpo_gamma": 1},
            {"stage": "simpo", "simpo": {"beta": 2.5, "gamma": 1.0}},
        ),
        (
            {"stage": "kto", "kto_chosen_weight": 2, "kto_rejected_weight": 0.5},
            {"kto": {"beta": 0.1, "desirable_weight": 2.0, "undesirable_weight": 0.5}},
        ),
        ({"finetuning_type": "full", "pure_bf16": True}, {"tuning": {"mode": "full"}, "model": {"dtype": "bfloat16"}}),
        ({"finetuning_type": "full", "bf16": True}, {"model": {"dtype": "bfloat16"}}),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": -3, "freeze_trainable_modules": "mlp,self_attn"},
            {"tuning": {"freeze": {"trainable_layers": -3, "trainable_modules": ["mlp", "self_attn"]}}},
        ),
        (
            {"quantization_bit": 4, "quantization_method": "bitsandbytes", "quantization_type": "fp4"},
            {"tuning": {"mode": "qlora", "qlora": {"quant_type": "fp4", "double_quant": True}}},
        ),
        (
            {"lora_target": "q_proj,v_proj", "use_rslora": True, "pissa_init": True, "additional_target": "lm_head"},
            {
                "tuning": {
                    "lora": {
                        "target_modules": ["q_proj", "v_proj"],
                        "use_rslora": True,
                        "init_lora_weights": "pissa",
                        "modules_to_save": ["lm_head"],
                    }
                }
            },
        ),
        ({"adapter_name_or_path": "a, b"}, {"model": {"adapters": ["a", "b"]}}),
        ({"dataset_dir": "my", "eval_dataset": "e"}, {"data": {"eval": ["my/dataset_info.json:e"]}}),
        ({"val_size": 0.2, "tokenized_path": "cache"}, {"data": {"eval_fraction": 0.2, "cache": "cache"}}),
        ({"train_on_prompt": True}, {"data": {"loss_on": "all"}}),
        ({"mask_history": True}, {"data": {"loss_on": "last_answer"}}),
        ({"learning_rate": "1.0e-4", "num_train_epochs": "2"}, {"training": {"learning_rate": 1e-4}}),
        ({"neat_packing": True}, {"training": {"packing": True}}),
        ({"packing": True, "neat_packing": False}, {"training": {"packing": True}}),
        ({"packing": False}, {"training": {"packing": False}}),
        ({"neat_packing": False}, {"training": {"packing": False}}),
        ({"stage": "pt", "packing": False}, {"training": {"packing": False}}),
        ({"disable_gradient_checkpointing": False}, {"training": {"gradient_checkpointing": True}}),
        (
            {"warmup_steps": 20, "optim": "adamw_torch_fused"},
            {"training": {"warmup_steps": 20, "optim": "adamw_torch_fused"}},
        ),
        ({"optim": "ademamix", "optim_args": "alpha=8"}, {"training": {"optim_args": "alpha=8"}}),
        ({"warmup_ratio": 0.1}, {"training": {"warmup_ratio": 0.1, "warmup_steps": 0}}),
        ({"warmup_steps": "0.1"}, {"training": {"warmup_ratio": 0.1, "warmup_steps": 0}}),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, {"training": {"warmup_ratio": 0.0}}),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
            {"training": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}},
        ),
        (
            {"neftune_noise_alpha": 5, "adam_beta2": 0.95, "torch_compile": True, "enable_liger_kernel": True},
            {
                "training": {
                    "neftune_noise_alpha": 5,
                    "adam_beta2": 0.95,
                    "torch_compile": True,
                    "use_liger_kernel": True,
                }
            },
        ),
        (
            {"logging_steps": 5, "eval_steps": 20, "report_to": "tensorboard", "load_best_model_at_end": True},
            {"training": {"logging_steps": 5, "eval_steps": 20, "report_to": ["tensorboard"]}},
        ),
        ({"early_stopping_steps": 3}, {"topology": {"early_stopping_patience": 3}}),
        ({"report_to": "swanlab"}, {"training": {"report_to": []}}),
        ({"flash_attn": "fa2", "bf16": True}, {"model": {"attn_implementation": "flash_attention_2"}}),
        ({"flash_attn": "auto"}, {"model": {"attn_implementation": None}}),
        ({"model_name_or_path": "Qwen/Q", "model_revision": "v2"}, {"model": {"name_or_path": "Qwen/Q@v2"}}),
        ({"moe_aux_loss_coef": 0.01}, {"model": {"router_aux_loss_coef": 0.01}}),
        ({"loraplus_lr_ratio": 16}, {"tuning": {"lora": {"loraplus_lr_ratio": 16}}}),
        (
            {"stage": "kto", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
            {"training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}},
        ),
        ({"deepspeed": "ds_z3.json"}, {"deepspeed": {"config": "ds_z3.json"}}),
        (
            {"stage": "ppo", "reward_model": "rm", "max_new_tokens": 512, "top_k": 0, "ppo_epochs": 2},
            {
                "rollout": {"reward_model": "rm", "max_new_tokens": 512, "temperature": 0.95, "top_p": 0.7},
                "ppo": {"num_ppo_epochs": 2, "kl_coef": 0.2, "kl_target": 6.0},
            },
        ),
    ],
)
def test_a_key_says_here_what_it_says_there(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    document = to_recipe({"model_name_or_path": "models/base", "dataset": "d", **keys}, "flat.yaml")

    def contains(value: Any, part: Any) -> bool:
        if isinstance(part, dict):
            return all(key in value and contains(value[key], inner) for key, inner in part.items())
        return bool(value == part)

    assert contains(_resolved(document), expected)


def _resolved(document: dict[str, Any]) -> dict[str, Any]:
    """With the defaults, and checked against the schema section by section."""
    resolved = dict(document)
    for name in (
        "model",
        "tuning",
        "data",
        "training",
        "topology",
        "reward",
        "dpo",
        "kto",
        "orpo",
        "simpo",
        "rollout",
        "ppo",
    ):
        section: Any = Recipe.model_fields[name].annotation
        resolved[name] = section.model_validate(document.get(name, {})).model_dump()
    return resolved


def test_all_keys_without_a_counterpart_are_named_at_once() -> None:
    message = error_of(use_galore=True, shift_attn=True, val_size=100, use_muon=True, typo=1)
    assert message.startswith("LLaMA-Factory keys that change the training and have no counterpart here: ")
    for part in ("use_galore: True", "shift_attn: True", "val_size: 100 (", "use_muon: True", "; typo"):
        assert part in message


def test_keys_that_are_switched_off_are_none() -> None:
    recipe_of(
        use_galore=False, shift_attn=False, fp16=False, adam_epsilon="1e-8", mix_strategy="concat", ref_model=None
    )
    recipe_of(use_kt=False, kt_optimize_rule=None, cpu_infer=32, chunk_size=8192, fp8=False, fp8_backend="auto")
    recipe_of(resize_vocab=False, init_special_tokens="noise_init", use_v1_kernels=False)


EXAMPLE: dict[str, Any] = {
    **{"trust_remote_code": True, "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"},
    **{"dataset": "one,two", "template": "qwen3_nothink", "cutoff_len": 2048, "max_samples": 1000},
    **{"preprocessing_num_workers": 16, "dataloader_num_workers": 4, "output_dir": "saves/x", "logging_steps": 10},
    **{"save_steps": 500, "plot_loss": True, "overwrite_output_dir": True, "save_only_model": False},
    **{"report_to": "none", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    **{"learning_rate": 1e-4, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1},
    **{"bf16": True, "ddp_timeout": 180000000, "resume_from_checkpoint": None},
}
"""The keys that LLaMA-Factory's own examples for text have in common."""


@pytest.mark.parametrize(
    "more",
    [
        {"stage": "sft"},
        {"stage": "sft", "finetuning_type": "full", "deepspeed": "z3.json"},
        {"stage": "sft", "ray_run_name": "x", "ray_num_workers": 4, "resources_per_worker": {"GPU": 1}},
        {"stage": "sft", "tokenized_path": "saves/tokens", "overwrite_cache": True},
        {"stage": "pt"},
        {"stage": "rm"},
        {"stage": "kto", "pref_beta": 0.1},
        {"stage": "dpo", "pref_beta": 0.1, "pref_loss": "sigmoid"},
        {"stage": "ppo", "reward_model": "saves/reward", "max_new_tokens": 512, "top_k": 0, "top_p": 0.9},
        {"stage": "sft", "quantization_bit": 4, "quantization_method": "bnb", "double_quantization": False},
        {
            "stage": "sft",
            "use_v1_kernels": True,
            "use_kv_cache": False,
            "flash_attn": "fa2",
            "disable_gradient_checkpointing": True,
        },
        {
            "stage": "sft",
            "infer_backend": "sglang",
            "sglang_maxlen": 4096,
            "sglang_config": {"tp_size": 1},
            "num_beams": 4,
        },
        {"stage": "sft", "val_size": 0.1, "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 500},
        {"stage": "sft", "finetuning_type": "full", "pure_bf16": True, "fp8": False},
        {"stage": "sft", "add_tokens": "<a>", "resize_vocab": True, "additional_target": "embed_tokens"},
        {"stage": "sft", "loraplus_lr_ratio": 16.0, "pissa_init": True, "pissa_iter": 16, "pissa_convert": True},
    ],
)
def test_the_keys_of_its_own_examples_are_taken(more: dict[str, Any]) -> None:
    assert recipe_of(**{**EXAMPLE, **more}).training.warmup_ratio == 0.1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"stage": "grpo"}, "stage: 'grpo' has no counterpart here; it can be pt, sft, rm, ppo, dpo, kto"),
        (
            {"stage": "dpo", "pref_loss": "kto_pair"},
            "pref_loss: 'kto_pair' has no counterpart here; it can be sigmoid, hinge, ipo, orpo, simpo",
        ),
        ({"stage": "dpo", "pref_loss": "orpo", "pref_ftx": 0.5}, "no counterpart here: pref_ftx: 0.5"),
        ({"stage": "dpo", "pref_loss": "hinge", "dpo_label_smoothing": 0.1}, "dpo.label_smoothing: loss_type hinge"),
        ({"finetuning_type": "oft"}, "finetuning_type: 'oft' has no counterpart"),
        ({"quantization_bit": 8}, "quantization_bit: 8 (here: four bits"),
        ({"quantization_bit": 4, "finetuning_type": "full"}, "quantization_bit: 4 (here: "),
        ({"learning_rate": "fast"}, "learning_rate: must be a number, not 'fast'"),
        ({"warmup_steps": 1.5}, "warmup_steps: must be a whole number, or a share below 1, not 1.5"),
        ({"save_steps": 0.1}, "save_steps: must be a whole number of steps, as a share of all steps would move when"),
        ({"eval_steps": 0.5}, "eval_steps: must be a whole number of steps"),
        ({"lora_rank": 8.5}, "lora_rank: must be a whole number, not 8.5"),
        ({"packing": "maybe"}, "packing: must be true or false, not 'maybe'"),
        ({"dataset": None}, "dataset: name a data set of data/dataset_info.json"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "training.lr_scheduler_type: "),
        ({"resume_from_checkpoint": "saves/x"}, "resume_from_checkpoint: saves/x"),
        ({"use_kt": True, "kt_weight_path": "w", "cpu_infer": 32}, "use_kt: True (here: no KTransformers; "),
        ({"flash_attn": "fa4"}, "flash_attn: 'fa4' has no counterpart here; it can be auto, disabled, sdpa, fa2, fa3"),
        ({"fp8": True, "fp8_backend": "te"}, "no counterpart here: fp8: True. "),
        ({"resize_vocab": True}, "resize_vocab: True"),
        ({"add_tokens": "<a>", "init_special_tokens": "desc_init"}, "init_special_tokens: desc_init"),
        ({"dataset_dir": "ONLINE"}, "dataset_dir: ONLINE (here: a folder with dataset_info.json and its files, as"),
        ({"dataset_dir": "REMOTE:llamafactory/demo_data"}, "dataset_dir: REMOTE:llamafactory/demo_data (here: a fold"),
        ({"stage": "ppo", "reward_model": "r", "num_beams": 2}, "num_beams: 2 (here: 1, as answers are sampled)"),
        ({"fp16": True}, "fp16: True"),
    ],
)
def test_what_cannot_be_done_is_named(keys: dict[str, Any], expected: str) -> None:
    assert expected in error_of(**keys)


# dataset_info.json


def info(folder: Path, **entries: Any) -> Path:
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder / "dataset_info.json"


def canonical(folder: Path, name: str, stage: str) -> list[dict[str, Any]]:
    (path,) = data_files(f"{folder}/dataset_info.json:{name}")
    return [tiny.said(read_values(record, stage, {})) for record in read_records(path)]


TURNS = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]


@pytest.mark.parametrize(
    ("entry", "record"),
    [
        ({}, {"instruction": "why?", "input": "", "output": "because"}),
        (
            {"columns": {"prompt": "q", "query": "more", "response": "a"}},
            {"q": "why?", "more": "", "a": "because", "messages": "not this"},
        ),
        (
            {"formatting": "sharegpt"},
            {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]},
        ),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "messages"},
                "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "patient", "assistant_tag": "doctor"},
            },
            {"messages": [{"who": "patient", "what": "why?"}, {"who": "doctor", "what": "because"}]},
        ),
    ],
)
def test_an_entry_says_what_columns_and_roles_are_called(
    tmp_path: Path, entry: dict[str, Any], record: dict[str, Any]
) -> None:
    (tmp_path / "qa.json").write_text(json.dumps([record]))
    info(tmp_path, qa={"file_name": "qa.json", **entry})
    assert canonical(tmp_path, "qa", "sft") == [{"messages": TURNS}]


def test_pairs_marks_and_plain_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"q": "why?", "good": "because", "bad": "no", "ok": False, "body": "x"})
    )
    info(
        tmp_path,
        pairs={
            "file_name": "a.jsonl",
            "ranking": True,
            "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"},
        },
        marks={"file_name": "a.jsonl", "columns": {"prompt": "q", "response": "good", "kto_tag": "ok"}},
        texts={"file_name": "a.jsonl", "columns": {"prompt": "body"}},
    )
    no = [{"role": "assistant", "content": "no"}]
    assert canonical(tmp_path, "pairs", "dpo") == [{"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": no}]
    assert canonical(tmp_path, "marks", "kto") == [{"prompt": TURNS[:1], "completion": TURNS[1:], "label": False}]
    assert canonical(tmp_path, "texts", "pretrain") == [{"text": "x"}]


@pytest.mark.parametrize(
    ("entry", "record"),
    [
        (
            {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "functions"}},
            {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]},
        ),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "messages", "tools": "functions"},
                "tags": {
                    "role_tag": "role",
                    "content_tag": "content",
                    "user_tag": "user",
                    "assistant_tag": "assistant",
                },
            },
            {"messages": TURNS},
        ),
        (
            {"formatting": "openai", "columns": {"messages": "messages", "tools": "functions"}},
            {"messages": TURNS},
        ),
        ({"columns": {"prompt": "q", "response": "a", "tools": "functions"}}, {"q": "why?", "a": "because"}),
    ],
)
def test_a_column_of_tools_is_read(tmp_path: Path, entry: dict[str, Any], record: dict[str, Any]) -> None:
    tool = {"name": "look", "description": "", "parameters": {}}
    (tmp_path / "qa.json").write_text(json.dumps([{**record, "functions": json.dumps([tool])}]))
    info(tmp_path, qa={"file_name": "qa.json", **entry})
    (path,) = data_files(f"{tmp_path}/dataset_info.json:qa")
    (record,) = read_records(path)
    values: Any = read_values(record, "sft", {})
    assert values.tools == [{"type": "function", "function": tool}]


def test_a_record_is_named_by_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "qa.json").write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "a"}]))
    info(tmp_path, data={"file_name": "qa.json"})
    with pytest.raises(InputError, match=r"qa\.json, record 2: stage sft needs"):
        canonical(tmp_path, "data", "sft")
    assert len(canonical(tmp_path, "data[:1]", "sft")) == 1


def test_the_digest_of_a_data_set_is_of_its_file_and_its_entry(tmp_path: Path) -> None:
    path = tmp_path / "dataset_info.json:qa"
    digests = set()
    for text, entry in [
        ("[]", {}),
        ("[ ]", {}),
        ("[]", {"columns": {"prompt": "q"}}),
        ("[]", {"formatting": "sharegpt"}),
    ]:
        (tmp_path / "qa.json").write_text(text)
        info(tmp_path, other={}, qa={"file_name": "qa.json", **entry})
        digests.add(content_digest(path))
        info(tmp_path, qa={"file_name": "qa.json", **entry})
        digests.add(content_digest(path))
    digests.add(content_digest(tmp_path / "dataset_info.json:qa[:5]"))
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (None, "has no data set 'qa'; it has other"),
        ({"hf_hub_url": "x/y"}, "qa: hf_hub_url: fedloom downloads nothing"),
        ({"script_url": "x"}, "qa: script_url: fedloom downloads nothing"),
        ({}, "qa: it names no file"),
        ({"file_name": None}, "qa: file_name: input should be a valid string"),
        ({"file_name": "dataset_info.json:qa"}, "qa: file_name: 'dataset_info.json:qa' is an entry itself"),
        (
            {"file_name": "qa.json", "formatting": "chatml"},
            "formatting: input should be 'alpaca', 'sharegpt' or 'openai'",
        ),
        (
            {"file_name": "qa.json", "formatting": ["alpaca"]},
            "formatting: input should be 'alpaca', 'sharegpt' or 'ope",
        ),
        ({"file_name": "qa.json", "columns": ["prompt"]}, "qa: columns: input should be a valid dictionary"),
        ({"file_name": "qa.json", "columns": {"prompt": 5}}, "qa: columns.prompt: input should be a valid string"),
        ({"file_name": "qa.json", "tags": "human"}, "qa: tags: input should be a valid dictionary"),
        (
            {"file_name": "qa.json", "tags": {"user_tag": ["human"]}},
            "qa: tags.user_tag: input should be a valid string",
        ),
        ({"file_name": "qa.json", "tags": {"human_tag": "x"}}, "qa: tags: no counterpart here for human_tag"),
        ({"file_name": "qa.json", "columns": {"images": "i"}}, "columns: no counterpart here for images"),
        ({"file_name": "qa.json", "num_samples": 10}, "no counterpart here for num_samples"),
        ({"file_name": "absent.json"}, "absent.json' matches no file"),
    ],
)
def test_an_entry_that_cannot_be_read_is_named(tmp_path: Path, entry: Any, expected: str) -> None:
    (tmp_path / "qa.json").write_text("[]")
    info(tmp_path, **({"other": {}} if entry is None else {"qa": entry}))
    with pytest.raises(InputError) as caught:
        data_files(str(tmp_path / "dataset_info.json:qa"))
    assert str(caught.value).startswith("data: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("role", [["x"], {"a": 1}, None, 5])
def test_a_turn_whose_role_is_no_text_is_named(tmp_path: Path, role: Any) -> None:
    (tmp_path / "qa.json").write_text(json.dumps([{"conversations": [{"from": role, "value": "why?"}]}]))
    info(tmp_path, qa={"file_name": "qa.json", "formatting": "sharegpt"})
    with pytest.raises(InputError, match=r"qa\.json, record 1: 'conversations' must be a list of"):
        canonical(tmp_path, "qa", "sft")


def test_turns_nested_beyond_measure_are_named(tmp_path: Path) -> None:
    (tmp_path / "qa.json").write_text('[{"conversations": ' + "[" * 600 + "]" * 600 + "}]")
    info(tmp_path, qa={"file_name": "qa.json", "formatting": "sharegpt"})
    with pytest.raises(InputError, match=r"qa\.json, record 1: it is nested too deeply"):
        canonical(tmp_path, "qa", "sft")


def test_a_count_without_measure_is_part_of_no_name(tmp_path: Path) -> None:
    info(tmp_path, qa={"file_name": "qa.json"})
    with pytest.raises(InputError, match=r"has no data set 'qa\[:9+\]'; it has qa$"):
        data_files(f"{tmp_path}/dataset_info.json:qa[:{'9' * 23}]")


@pytest.mark.parametrize("text", [None, "{", "[]", "[" * 100_000])
def test_an_info_file_that_is_none_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(InputError, match=r"data: .*dataset_info\.json"):
        data_files(str(tmp_path / "dataset_info.json:qa"))


@pytest.mark.skipif(not LLAMA_FACTORY.is_dir(), reason="the real data are not here")
def test_llama_factorys_own_entries_are_read_whole(tmp_path: Path) -> None:
    for name in ("alpaca", "dpo", "kto"):
        packed = (LLAMA_FACTORY / f"{name}_en_demo.json.gz").read_bytes()
        (tmp_path / f"{name}_en_demo.json").write_bytes(gzip.decompress(packed))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    pair_columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    mark_columns = {"messages": "messages", "kto_tag": "label"}
    info(
        tmp_path,
        alpaca_en_demo={"file_name": "alpaca_en_demo.json"},
        dpo_en_demo={
            "file_name": "dpo_en_demo.json", "ranking": True, "formatting": "sharegpt", "columns": pair_columns
        },
        kto_en_demo={
            "file_name": "kto_en_demo.json", "formatting": "sharegpt", "columns": mark_columns, "tags": tags
        },
    )  # fmt: skip
    for name, stage, count in (("alpaca", "sft", 999), ("dpo", "dpo", 200), ("kto", "kto", 200)):
        plain = read_records(LLAMA_FACTORY / f"{name}_en_demo.json.gz")
        expected = [tiny.said(read_values(record, stage, {})) for record in plain]
        assert canonical(tmp_path, f"{name}_en_demo", stage) == expected
        assert len(expected) == count


def test_what_turns_say_besides_role_and_content_is_kept(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    (tmp_path / "d.json").write_text(json.dumps([{"messages": turns}]))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "d.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"own": entry}))
    (record,) = read_records(Path(f"{tmp_path}/dataset_info.json:own"))
    assert record.fields["conversations"][1] == turns[1]
