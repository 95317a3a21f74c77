"""transformers keeps to what we lean on besides its documentation: names, masks, hooks, generation, chat templates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.chat_template_utils import render_jinja_template

from core_training.engine.optimizers import build_optimizer, decayed_parameters
from core_training.recipe.schema import Recipe
from tests import tiny
from tests.contracts.leaning import leans, look_up, names
from tests.contracts.tiny_models import EOS, PAD, VOCABULARY, classifier, gpt2, llama, tokens

NAMES = {
    "core_training/tuning/lora.py": ["transformers.pytorch_utils:Conv1D"],
    "core_training/tuning/freeze.py": ["transformers:PreTrainedConfig.get_text_config"],
    "core_training/stages/chat.py": ["transformers.utils.chat_template_utils:render_jinja_template"],
    "core_training/stages/policy_gradient.py": ["transformers.modeling_layers:GradientCheckpointingLayer"],
    "core_training/distributed/group.py": ["transformers.integrations.deepspeed:unset_hf_deepspeed_config"],
    "core_training/engine/deepspeed_config.py": [
        "transformers.integrations.deepspeed:HfTrainerDeepSpeedConfig.trainer_config_finalize",
    ],
    "core_training/engine/preparation.py": [
        "transformers:PreTrainedModel.activation_checkpointing_enable",
        "transformers:PreTrainedModel.disable_input_require_grads",
    ],
    "core_training/models/heads.py": ["transformers:PreTrainedModel.base_model_prefix"],
    "core_training/models/scored_model.py": ["transformers:PreTrainedModel._can_set_experts_implementation"],
    "core_training/models/conversation.py": ["transformers:TextStreamer.on_finalized_text"],
}


@pytest.mark.parametrize(("file", "name"), names(NAMES), ids=str)
def test_a_name_is_where_it_was(file: str, name: str) -> None:
    look_up(file, name)


# --- optimizers, which are Trainer's without it


@leans("core_training/engine/optimizers.py")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_trainer_does_not_decay_is_left_alone(make: Callable[[], Any]) -> None:
    model = make()
    parameters = {name for name, _ in model.named_parameters()}
    assert decayed_parameters(model) == parameters & set(Trainer.get_decay_parameter_names(None, model))
    assert parameters - decayed_parameters(model) == {
        name for name in parameters if name.endswith("bias") or "norm" in name or ".ln_" in f".{name}"
    }


@leans("core_training/engine/optimizers.py")
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_an_optimizer_is_the_one_that_trainer_makes(
    optim: str, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe, model = make_recipe(training={"optim": optim, "learning_rate": 0.5, "weight_decay": 0.1}), llama()
    ours = build_optimizer(model, recipe, 0.5)
    arguments = TrainingArguments(str(tmp_path), optim=optim, learning_rate=0.5, weight_decay=0.1, use_cpu=True)
    theirs = Trainer(model=model, args=arguments).create_optimizer()
    assert type(ours) is type(theirs)
    assert ours.defaults == {**theirs.defaults, "weight_decay": ours.defaults["weight_decay"]}
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert list(map(id, mine.pop("params"))) == list(map(id, other.pop("params")))
        assert mine == other


# --- forwards: positions, padding, packing, chosen logits


@leans("core_training/stages/language.py", "core_training/data/rows.py")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_logits_are_computed_at_the_positions_that_were_asked_for(make: Callable[[], Any]) -> None:
    model, ids = make(), tokens(2, 9)
    positions = torch.arange(9).repeat(2, 1)
    whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert whole.shape == (2, 9, VOCABULARY)
    chosen = torch.tensor([0, 3, 7])
    some = model(input_ids=ids, position_ids=positions, logits_to_keep=chosen, use_cache=False).logits
    torch.testing.assert_close(some, whole[:, chosen])


@leans("core_training/stages/policy_gradient.py")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_output_layer_is_called_with_the_hidden_states_of_these_positions(make: Callable[[], Any]) -> None:
    model, ids = make(), tokens(2, 9)
    seen: list[torch.Tensor] = []
    watch = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(input_ids=ids, logits_to_keep=torch.tensor([2, 5]), use_cache=False).logits
    watch.remove()
    (hidden,) = seen
    assert hidden.shape == (2, 2, 16)
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits)


@leans("core_training/data/rows.py")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_on_the_right_needs_no_mask(make: Callable[[], Any]) -> None:
    model, ids = make(), tokens(1, 6)
    alone = model(input_ids=ids, position_ids=torch.arange(6)[None], use_cache=False).logits
    padded = nn.functional.pad(ids, (0, 4), value=PAD)
    beside = model(input_ids=padded, position_ids=torch.arange(10)[None], use_cache=False).logits
    torch.testing.assert_close(beside[:, :6], alone)


@leans("core_training/data/rows.py", "core_training/models/reading.py")
@pytest.mark.parametrize("training", [False, True])
def test_positions_that_start_again_keep_the_examples_of_a_row_apart(training: bool) -> None:
    model, ids = llama().train(training), tokens(2, 8)
    positions = torch.arange(8) % 5
    other = ids.clone()
    other[:, :5] = tokens(2, 5, seed=1)
    first, second = (
        model(input_ids=rows, position_ids=positions.repeat(2, 1), use_cache=False).logits for rows in (ids, other)
    )
    alone = model(input_ids=ids[:, 5:], position_ids=torch.arange(3).repeat(2, 1), use_cache=False).logits
    assert torch.equal(first[:, 5:], second[:, 5:])
    torch.testing.assert_close(first[:, 5:], alone)


@leans("core_training/models/reading.py")
def test_what_a_hook_makes_of_the_embedded_tokens_is_what_the_layers_see_and_a_mask_is_an_exact_zero() -> None:
    model = llama()
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    row = tokens(1, 8)
    logits = model(input_ids=row, position_ids=torch.arange(8)[None] % 4, use_cache=False).logits
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, 4:].square().sum(), seen)
    assert not gradient[:, :4].any()
    assert gradient[:, 4:].any()


# --- what is set on a model


@leans("core_training/models/precision.py")
def test_a_forward_that_is_set_on_a_model_is_the_one_that_runs_when_it_is_called_and_when_it_generates() -> None:
    model = llama()
    calls: list[str] = []

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(method.__name__)
            return method(self, *args, **kwargs)

        return counting

    model.forward = MethodType(counted(type(model).forward), model)
    model.generate = MethodType(counted(type(model).generate), model)
    assert {"forward", "generate"} <= vars(model).keys()
    model(input_ids=tokens(1, 4))
    assert calls == ["forward"]
    model.generate(input_ids=tokens(1, 4), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert calls == ["forward", "generate", "forward", "forward"]
    assert vars(model).pop("forward") is not None
    model(input_ids=tokens(1, 4))
    assert len(calls) == 4


@leans("core_training/models/heads.py", "core_training/models/export.py", "core_training/models/loading.py")
def test_a_plain_model_has_no_peft_config_by_which_a_tuned_one_is_known() -> None:
    assert not hasattr(llama(), "peft_config")


@leans("core_training/tuning/lora.py", "core_training/models/parameters.py")
def test_tied_embeddings_are_one_parameter() -> None:
    model = llama(tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert "lm_head.weight" in dict(model.named_parameters(remove_duplicate=False))
    assert llama().get_output_embeddings().weight is not llama().get_input_embeddings().weight


@leans("core_training/tuning/freeze.py", "core_training/models/context.py", "core_training/models/heads.py")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_configuration_counts_layers_width_and_positions(make: Callable[[], Any]) -> None:
    model = make()
    config = model.config.get_text_config()
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    assert [len(stack) for stack in stacks] == [config.num_hidden_layers] == [2]
    assert config.hidden_size == 16
    assert model.config.max_position_embeddings == 64
    assert model.config.initializer_range == 0.3
    assert model.get_input_embeddings().num_embeddings == VOCABULARY


# --- loading


@leans("core_training/models/loading.py", "core_training/models/precision.py")
def test_what_the_files_lack_is_told_and_the_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    llama(tie_word_embeddings=True).save_pretrained(tmp_path)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype="bfloat16", local_files_only=True, use_safetensors=True, output_loading_info=True
        )

    model, loading = load()
    assert sorted(loading["missing_keys"]) == [], "a tied output layer is told as missing"
    assert model.config.dtype is torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert sorted(load()[1]["missing_keys"]) == ["model.layers.1.mlp.up_proj.weight"]


# --- a score


@leans("core_training/models/heads.py", "core_training/stages/reward.py", "core_training/stages/rewards.py")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_classifier_scores_every_token_and_answers_with_the_last_that_is_no_padding(make: Callable[[], Any]) -> None:
    made = classifier(make())
    ids = tokens(3, 7)
    ids[0, 5:], ids[1, 2:] = PAD, PAD
    scores: list[torch.Tensor] = []
    watch = made.score.register_forward_hook(lambda _, inputs, output: scores.append(output))
    answered = made(input_ids=ids, position_ids=torch.arange(7).repeat(3, 1), use_cache=False).logits
    watch.remove()
    (each,) = scores
    assert each.shape == (3, 7, 1)
    assert torch.equal(answered, each[torch.arange(3), torch.tensor([4, 1, 6])])
    assert not any(parameter.is_meta for parameter in made.parameters())
    assert not any(buffer.is_meta for buffer in made.buffers())


@leans("core_training/models/heads.py")
def test_an_architecture_without_a_classifier_is_a_value_error() -> None:
    from transformers import MambaConfig

    with torch.device("meta"), pytest.raises(ValueError, match="Unrecognized configuration"):
        AutoModelForSequenceClassification.from_config(MambaConfig(hidden_size=8, num_hidden_layers=1))


# --- activations that are computed again


def forwards_of_a_layer(model: Any, ids: torch.Tensor) -> int:
    """How often the first layer's inside runs in a forward and a backward."""
    calls: list[None] = []
    watch = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    watch.remove()
    return len(calls)


@leans("core_training/stages/policy_gradient.py", "core_training/engine/preparation.py")
def test_a_layer_is_computed_again_when_it_alone_is_in_training_mode_and_dropout_stays_out() -> None:
    model = llama(attention_dropout=0.5)
    plain = torch.autograd.grad(model(input_ids=tokens(2, 6)).logits.square().sum(), model.parameters())
    model.activation_checkpointing_enable()
    assert forwards_of_a_layer(model, tokens(2, 6)) == 1, "in evaluation mode nothing is computed again"
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers == list(model.model.layers)
    for layer in layers:
        layer.training = True
    assert forwards_of_a_layer(model, tokens(2, 6)) == 2
    again = torch.autograd.grad(model(input_ids=tokens(2, 6)).logits.square().sum(), model.parameters())
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@leans("core_training/engine/preparation.py")
def test_a_model_whose_hook_is_taken_away_before_each_time_has_one_however_often_checkpointing_is_enabled() -> None:
    model = llama()
    hooks = model.get_input_embeddings()._forward_hooks
    model.disable_input_require_grads()  # there is none yet
    for _ in range(3):
        model.disable_input_require_grads()
        model.activation_checkpointing_enable()
        assert len(hooks) == 1
    model.requires_grad_(False)
    assert model(input_ids=tokens(1, 4)).logits.requires_grad, "nothing leads from the loss to adapters in the layers"


# --- generation


def sampled(**settings: Any) -> GenerationConfig:
    """As core_training/stages/rollout.py asks for answers."""
    return GenerationConfig(
        **(
            {
                "do_sample": True,
                "max_new_tokens": 5,
                "temperature": 0.7,
                "top_p": 1.0,
                "eos_token_id": [EOS],
                "pad_token_id": PAD,
                "top_k": 0,
                "remove_invalid_values": True,
            }
            | settings
        )
    )


@leans("core_training/stages/rollout.py")
def test_answers_are_drawn_from_the_tempered_distribution_over_all_tokens_by_torchs_own_generator() -> None:
    """Nearly even over 120 tokens, of which generation would by itself keep 50; whatever the model's settings say."""
    model = llama()
    model.generation_config = GenerationConfig(repetition_penalty=9.0, top_k=2, num_beams=3, min_p=0.9)
    own, model.generation_config = model.generation_config, GenerationConfig()
    ids = tokens(4, 6)
    torch.manual_seed(3)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=sampled(eos_token_id=[], temperature=4.0)
    )
    model.generation_config = own
    torch.manual_seed(3)
    expected = ids
    for _ in range(5):
        logits = model(input_ids=expected, use_cache=False).logits[:, -1].float() / 4.0
        expected = torch.cat([expected, torch.multinomial(logits.softmax(dim=-1), 1)], dim=1)
    assert torch.is_tensor(output)
    assert torch.equal(output, expected)


@leans("core_training/stages/rollout.py")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_on_the_left_does_not_show_in_an_answer(make: Callable[[], Any]) -> None:
    model, ids = make(), tokens(1, 4)
    settings = sampled(do_sample=False, temperature=None, top_p=None, top_k=None, eos_token_id=[])
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    padded = nn.functional.pad(ids, (3, 0), value=PAD)
    beside = model.generate(input_ids=padded, attention_mask=(padded != PAD).long(), generation_config=settings)
    assert torch.equal(beside[:, 3:], alone)


@leans("core_training/stages/rollout.py")
def test_each_of_several_tokens_ends_an_answer_and_padding_follows() -> None:
    model, ids = llama(), tokens(6, 4)
    stops = list(range(EOS, EOS + VOCABULARY // 3))
    torch.manual_seed(0)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=sampled(eos_token_id=stops)
    )
    ended = 0
    for answer in output[:, 4:].tolist():
        stop = next((place for place, token in enumerate(answer) if token in stops), len(answer))
        assert set(answer[stop + 1 :]) <= {PAD}
        ended += stop < len(answer)
    assert ended > 1


@leans("core_training/stages/rollout.py")
def test_numbers_that_are_none_do_not_end_generation() -> None:
    model = llama()
    model.lm_head.weight.data.fill_(float("nan"))
    output = model.generate(
        input_ids=tokens(1, 3), attention_mask=torch.ones(1, 3).long(), generation_config=sampled(max_new_tokens=2)
    )
    assert output.shape[1] > 3


# --- chat templates


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tiny.make_model(tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


CHAT = [
    {"role": "user", "content": "Übel?"},
    {"role": "assistant", "content": "See the ward."},
    {"role": "user", "content": "Again?"},
    {"role": "assistant", "content": "Nein, größer."},
]


@leans("core_training/stages/chat.py")
def test_the_spans_that_a_template_marks_are_characters_of_the_text_that_it_gives(tokenizer: Any) -> None:
    _, (spans,) = render_jinja_template(
        conversations=[CHAT],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=False)
    assert [text[start:end] for start, end in spans] == ["See the ward.<|eos|>", "Nein, größer.<|eos|>"]


@leans("core_training/stages/chat.py", "core_training/models/conversation.py")
def test_a_tokenizer_says_which_characters_a_token_is_of_and_adds_none_unasked(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    text = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert [encoded["offset_mapping"][0], encoded["offset_mapping"][-1][1]] == [(0, len("<|bos|>")), len(text)]
    whole = tokenizer.apply_chat_template(CHAT[:1], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert whole["input_ids"] == encoded["input_ids"]
