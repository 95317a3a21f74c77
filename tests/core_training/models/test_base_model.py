"""What a run starts from: earlier runs merged in, heads, digests that tell one start from another."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.heads import innermost, with_score_head
from core_training.models.results import find_result, load_result, load_reward_model
from core_training.recipe.schema import Recipe
from tests import tiny
from tests.core_training.tuned import IDS, JUDGED, finished, outputs

MakeRecipe = Callable[..., Recipe]
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "freeze": {"mode": "freeze", "freeze": {"trainable_layers": 1, "extra_modules": ["embed_tokens"]}},
    "lora": {"mode": "lora", "lora": {"r": 4, "modules_to_save": ["norm"]}},
    "dora": {"mode": "lora", "lora": {"r": 4, "use_dora": True, "use_rslora": True}},
    "pissa": {"mode": "lora", "lora": {"r": 4, "init_lora_weights": "pissa"}},
    "embeddings": {"mode": "lora", "lora": {"r": 4, "modules_to_save": ["embed_tokens"]}},
}


def untrained(make_recipe: MakeRecipe, *runs: Path, **sections: Any) -> BaseModel:
    """The model that a recipe with these earlier runs starts from."""
    return BaseModel(make_recipe(model={"adapters": [str(run) for run in runs]}, **sections))


@pytest.mark.parametrize("name", TUNINGS)
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_starts_where_the_earlier_one_ended(
    make_recipe: MakeRecipe, tmp_path: Path, name: str, stage: str
) -> None:
    ended = finished(make_recipe(rollout=JUDGED, stage=stage, tuning=TUNINGS[name]), tmp_path / "run")
    start = untrained(make_recipe, tmp_path / "run")
    assert (outputs(start.model) - outputs(ended.model)).abs().max() < 1e-5
    assert (outputs(start.model) - outputs(BaseModel(make_recipe()).model)).abs().max() > 1e-2


def test_a_four_bit_run_is_merged_into_the_whole_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    quantised, plain = (make_recipe(tuning={**TUNINGS["lora"], "mode": mode}) for mode in ("qlora", "lora"))
    finished(quantised, tmp_path / "run")
    ended = finished(plain, tmp_path / "plain")  # to the same state
    start = untrained(make_recipe, tmp_path / "run")
    assert (outputs(start.model) - outputs(ended.model)).abs().max() < 1e-5


def test_a_quantised_run_may_start_from_earlier_ones(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The merged weights are quantised: the same four bits as of a model that was saved merged."""
    finished(make_recipe(), tmp_path / "run")
    merged = BaseModel(make_recipe(model={"adapters": [str(tmp_path / "run")]}, tuning={"mode": "full"}))
    merged.model.save_pretrained(tmp_path / "merged")
    merged.tokenizer.save_pretrained(tmp_path / "merged")
    one = untrained(make_recipe, tmp_path / "run", tuning={"mode": "qlora"})
    other = BaseModel(make_recipe(model={"name_or_path": str(tmp_path / "merged")}, tuning={"mode": "qlora"}))
    others = dict(other.model.named_parameters())
    assert all(torch.equal(parameter, others[name]) for name, parameter in one.model.named_parameters())


def test_the_last_run_of_a_chain_brings_the_earlier_ones_along(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    names = ["pissa", "freeze", "dora"]
    runs = [tmp_path / name for name in names]
    for number, name in enumerate(names):
        recipe = make_recipe(model={"adapters": [str(run) for run in runs[:number][-1:]]}, tuning=TUNINGS[name])
        ended = finished(recipe, runs[number], seed=number)
    last, all_of_them = untrained(make_recipe, runs[-1]), untrained(make_recipe, *runs)
    assert (outputs(last.model) - outputs(ended.model)).abs().max() < 1e-5
    assert last.base_digest == all_of_them.base_digest
    assert torch.equal(outputs(last.model), outputs(all_of_them.model))


def test_a_whole_model_takes_the_place_of_what_was_before(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    finished(make_recipe(), tmp_path / "adapter")
    ended = finished(make_recipe(tuning={"mode": "full"}), tmp_path / "whole", seed=1)
    both, alone = (
        untrained(make_recipe, tmp_path / "adapter", tmp_path / "whole"),
        untrained(make_recipe, tmp_path / "whole"),
    )
    assert torch.equal(outputs(both.model), outputs(ended.model))
    assert both.base_digest == alone.base_digest


def test_an_adapter_of_another_base_is_refused(make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    finished(make_recipe(), tmp_path / "first")
    finished(make_recipe(model={"adapters": [str(tmp_path / "first")]}), tmp_path / "second")
    finished(make_recipe(), tmp_path / "stranger", seed=1)
    model, digest = re.escape(str(tiny_model)), r"\(digest [0-9a-f]{12}…\)"
    with pytest.raises(
        InputError, match=rf"first was trained on {model} {digest}, not on {model} \+ .*stranger {digest}"
    ):
        untrained(make_recipe, tmp_path / "stranger", tmp_path / "second")


def test_what_cannot_be_started_from_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    finished(make_recipe(stage="reward"), tmp_path / "reward")
    with pytest.raises(InputError, match=r"reward is a reward model, .*name it as rollout.reward_model"):
        untrained(make_recipe, tmp_path / "reward", rollout=JUDGED, stage="ppo")
    with pytest.raises(InputError, match=r"model.adapters: .*absent: no such run folder"):
        untrained(make_recipe, tmp_path / "absent")
    finished(make_recipe(), tmp_path / "wrong")
    (tmp_path / "wrong" / "adapter" / "fedloom.json").unlink()
    with pytest.raises(InputError, match=r"model.adapters: .*wrong does not fit the model: .*fedloom.json"):
        untrained(make_recipe, tmp_path / "wrong")
    recipe = make_recipe(model={"adapters": [str(tmp_path / "itself")]})
    shutil.copytree(tmp_path / "wrong", tmp_path / "itself")
    (tmp_path / "itself" / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "itself" / "adapter" / "fedloom.json").write_text(
        json.dumps({"base_digest": "0" * 64, "vocabulary_digest": "0" * 64})
    )
    with pytest.raises(InputError, match="itself starts from itself"):
        untrained(make_recipe, tmp_path / "itself")


def test_the_initial_digest_tells_what_sites_must_have_in_common(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    finished(make_recipe(), tmp_path / "run")
    finished(make_recipe(), tmp_path / "other", seed=1)
    qlora = {"mode": "qlora", "lora": {"r": 4, "lora_alpha": 8}}
    starts = [
        untrained(make_recipe),
        untrained(make_recipe, tmp_path / "run"),
        untrained(make_recipe, tmp_path / "other"),
        untrained(make_recipe, tuning=qlora),
        untrained(make_recipe, tuning={**qlora, "qlora": {"quant_type": "fp4"}}),
        untrained(make_recipe, tuning={**qlora, "qlora": {"double_quant": False}}),
        untrained(make_recipe, tmp_path / "run", tuning=qlora),
    ]
    # All these have one initial state: what differs is the frozen weights.
    assert len({start.initial_state.digest for start in starts}) == 1
    assert len({start.initial_digest for start in starts}) == len(starts)
    assert untrained(make_recipe, tmp_path / "run").initial_digest == starts[1].initial_digest


def test_the_score_is_drawn_from_the_seed(make_recipe: MakeRecipe) -> None:
    def score(mode: str, seed: int) -> torch.Tensor:
        base = BaseModel(make_recipe(stage="reward", tuning={"mode": mode}, training={"seed": seed}))
        return base.trainable_parameters["score.weight"].detach()

    for mode in ("full", "freeze", "lora", "qlora"):
        assert torch.equal(score(mode, 1), score("full", 1))
    assert not torch.equal(score("full", 1), score("full", 2))
    assert 0.5 < score("full", 1).std() / 0.02 < 2


@pytest.mark.parametrize("mode", ["full", "freeze", "lora", "qlora"])
def test_heads_are_float32_on_a_bfloat16_model(make_recipe: MakeRecipe, mode: str) -> None:
    for stage, head in (("reward", "score"), ("ppo", "value_head")):
        base = BaseModel(make_recipe(model={"dtype": "bfloat16"}, rollout=JUDGED, stage=stage, tuning={"mode": mode}))
        assert base.trainable_parameters[f"{head}.weight"].dtype == torch.float32
        output = base.model(input_ids=IDS, output_hidden_states=True)
        values = getattr(innermost(base.model), head)(output.hidden_states[-1])
        assert (values.dtype, values.shape) == (torch.float32, (2, 20, 1))
        if stage == "reward":
            assert torch.equal(output.logits, values[:, -1])  # in the model too


def test_a_score_is_drawn_where_the_configuration_names_no_spread() -> None:
    config = OPTConfig(
        vocab_size=50, hidden_size=64, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=64
    )
    assert 0.5 < with_score_head(OPTForCausalLM(config), seed=1).score.weight.std() / 0.02 < 2


def test_a_bfloat16_run_leaves_nothing_of_itself_but_its_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A run in float32 that starts from one in bfloat16 computes in float32."""
    ended = finished(make_recipe(model={"dtype": "bfloat16"}, tuning={"mode": "full"}), tmp_path / "run")
    start = untrained(make_recipe, tmp_path / "run")
    assert start.model(input_ids=IDS).logits.dtype == torch.float32
    assert 0 < (outputs(start.model) - outputs(ended.model)).abs().max() < 0.05


def test_models_are_collected_and_libraries_are_not_looked_at(make_recipe: MakeRecipe) -> None:
    """A full collection would go through all that the libraries hold otherwise."""
    model = weakref.ref(BaseModel(make_recipe(model={"dtype": "bfloat16"}, tuning={"mode": "full"})).model)
    gc.collect()
    assert model() is None
    code = """
import gc
from core_training.models.libraries import own_the_process, settle_libraries
own_the_process()
settle_libraries()
assert gc.get_freeze_count() > 3 * len(gc.get_objects())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_first_values_are_zero(make_recipe: MakeRecipe) -> None:
    base = BaseModel(make_recipe(rollout=JUDGED, stage="ppo"))
    assert innermost(base.model).value_head(torch.randn(3, 32)).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "its weights are quantised"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "it is a reward model or classifier"),
    ],
)
def test_what_is_no_plain_language_model_is_refused(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | change))
    for mode in ("full", "freeze", "qlora"):
        with pytest.raises(InputError, match=expected):
            BaseModel(make_recipe(model={"name_or_path": str(tmp_path / "model")}, tuning={"mode": mode}))


@pytest.mark.parametrize("mode", ["full", "freeze", "lora"])
def test_a_reward_model_judges_as_it_was_trained(make_recipe: MakeRecipe, tmp_path: Path, mode: str) -> None:
    ended = finished(make_recipe(stage="reward", tuning={"mode": mode}), tmp_path / "run")
    policy = BaseModel(make_recipe(rollout=JUDGED, stage="ppo"))
    judge = load_reward_model(tmp_path / "run", policy.vocabulary_digest)
    assert (outputs(judge) - outputs(ended.model)).abs().max() < 1e-5
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_a_reward_model_may_start_from_a_language_model_that_was_trained(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Its layers are those of the earlier run, and its score is its own."""
    ended = finished(make_recipe(tuning=TUNINGS["embeddings"]), tmp_path / "sft")
    start = untrained(make_recipe, tmp_path / "sft", stage="reward", tuning={"mode": "full"})
    hidden = ended.model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    expected = hidden[:, -1] @ start.model.score.weight.T
    assert (outputs(start.model) - expected).abs().max() < 1e-5


def test_a_reward_model_that_cannot_judge_is_refused(make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    policy = BaseModel(make_recipe(rollout=JUDGED, stage="ppo"))
    finished(make_recipe(), tmp_path / "sft")
    with pytest.raises(InputError, match=r"rollout.reward_model: .*sft is of stage sft; name a run of stage reward"):
        load_reward_model(tmp_path / "sft", policy.vocabulary_digest)
    smaller = tiny.make_model(tmp_path / "smaller", vocabulary=350)
    finished(make_recipe(model={"name_or_path": str(smaller)}, stage="reward"), tmp_path / "reward")
    with pytest.raises(InputError, match=r"rollout.reward_model: .*reads other tokens than the model that it judges"):
        load_reward_model(tmp_path / "reward", policy.vocabulary_digest)


def test_a_value_head_is_kept_apart_and_read_back(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for mode in ("full", "freeze", "lora", "qlora"):
        ended = finished(make_recipe(rollout=JUDGED, stage="ppo", tuning={"mode": mode}), tmp_path / mode)
        (folder,) = [path for path in (tmp_path / mode).iterdir() if path.is_dir()]
        assert set(load_file(folder / "value_head.safetensors")) == {"value_head.weight", "value_head.bias"}
        again = load_result(find_result(tmp_path / mode))
        for name, parameter in ended.trainable_parameters.items():
            assert torch.equal(parameter, again.trainable_parameters[name])


def test_a_result_on_a_base_that_has_changed_is_refused(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    finished(make_recipe(model={"name_or_path": str(tmp_path / "model")}), tmp_path / "run")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"does not fit the base model .*: it was trained on a base of digest"):
        load_result(find_result(tmp_path / "run"))


def test_sites_that_write_conversations_otherwise_do_not_start_alike(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(tiny.CHAT_TEMPLATE.replace("<|user|>", "<|user|> "))
    other = BaseModel(make_recipe(model={"chat_template": str(tmp_path / "chat.jinja")}))
    assert other.initial_digest != BaseModel(make_recipe()).initial_digest


def test_a_tokenizer_may_know_more_tokens_than_its_model_as_long_as_nobody_uses_them(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    """As Gemma 3's smaller models do, which are published with a token for images and no row for it."""
    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    clean = tiny.write_jsonl(tmp_path / "clean.jsonl", tiny.questions(0, 8))
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [*tiny.questions(0, 8), {"question": "What?", "answer": "<image>"}])
    model = {"name_or_path": str(tmp_path / "model")}
    assert open_engine(make_recipe(model=model, data={"train": str(clean)})).train(1).tokens
    with pytest.raises(InputError, match=r"bad\.jsonl, line 9: token \d+ is one of the tokenizer's"):
        open_engine(make_recipe(model=model, data={"train": str(bad)}))
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"model.name_or_path: .* rows"):
        BaseModel(make_recipe(model=model))
