"""Each tuning mode trains exactly what it should, with the heads of the stages, and leaves the rest as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from core_training.engine.dataset import load_dataset
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.heads import innermost
from core_training.recipe.schema import Recipe
from core_training.tuning.base import load_tuning
from core_training.tuning.freeze import FreezeTuning
from core_training.tuning.lora import LoraTuning
from tests.core_training.tuned import IDS, JUDGED, loss, outputs, step
from tests.families.building import tiny_config

MakeRecipe = Callable[..., Recipe]

LAYER = [
    "input_layernorm.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "post_attention_layernorm.weight", "self_attn.k_proj.weight", "self_attn.o_proj.weight",
    "self_attn.q_proj.weight", "self_attn.v_proj.weight",
]  # fmt: skip
EMBEDDINGS, NORM = "model.embed_tokens.weight", "model.norm.weight"  # the output layer is the embeddings' matrix
SCORE, VALUE = {"score.weight"}, {"value_head.weight", "value_head.bias"}
MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "freeze": {"mode": "freeze", "freeze": {"trainable_layers": 1}},
    "lora": {"mode": "lora", "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
    "qlora": {"mode": "qlora", "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "modules": {"modules_to_save": ["embed_tokens", "norm"]},
}
HEADS = {"sft": set(), "reward": SCORE, "ppo": VALUE}
CELLS = [(mode, stage) for mode in MODES for stage in HEADS]


def layers(*numbers: int) -> set[str]:
    return {f"model.layers.{i}.{name}" for i in numbers for name in LAYER}


def factors(*modules: str, count: int = 2) -> set[str]:
    return {f"model.layers.{i}.{m}.lora_{f}.weight" for i in range(count) for m in modules for f in "AB"}


QV = factors("self_attn.q_proj", "self_attn.v_proj")
WHOLE = {"full": layers(0, 1) | {EMBEDDINGS, NORM}, "freeze": layers(1), "lora": QV, "qlora": QV}


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """All that is not trained: frozen parameters, what quantisation keeps beside them, buffers."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    kept |= {name: b.detach().clone() for name, b in model.named_buffers()}
    for name, parameter in model.named_parameters():
        if (quantised := getattr(parameter, "quant_state", None)) is not None:
            kept |= {f"{name}.{k}": v.clone() for k, v in quantised.as_dict(packed=True).items()}
    return kept


@pytest.mark.parametrize(("mode", "stage"), CELLS)
def test_a_mode_trains_what_it_says_and_the_head(make_recipe: MakeRecipe, mode: str, stage: str) -> None:
    base = BaseModel(make_recipe(rollout=JUDGED, stage=stage, tuning=MODES[mode]))
    assert set(base.trainable_parameters) == WHOLE[mode] | HEADS[stage]


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        ({"mode": "lora", "lora": {"target_modules": "all-linear"}}, factors(
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )),
        ({"mode": "lora", "lora": {"target_modules": ["q_proj"], "use_dora": True}},
         factors("self_attn.q_proj") | {f"model.layers.{i}.self_attn.q_proj.lora_magnitude_vector" for i in (0, 1)}),
        ({"mode": "qlora", "lora": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}},
         factors("self_attn.q_proj") | {EMBEDDINGS, NORM}),
        ({"mode": "freeze", "freeze": {"trainable_layers": -1, "trainable_modules": ["mlp", "q_proj"]}},
         {f"model.layers.0.{name}" for name in LAYER if name.startswith(("mlp", "self_attn.q_proj"))}),
        ({"mode": "freeze", "freeze": {"trainable_layers": 0, "extra_modules": ["lm_head", "norm"]}},
         {EMBEDDINGS, NORM}),
    ],
)  # fmt: skip
def test_the_settings_choose_what_is_trained(make_recipe: MakeRecipe, tuning: Any, expected: set[str]) -> None:
    assert set(BaseModel(make_recipe(tuning=tuning)).trainable_parameters) == expected


@pytest.mark.parametrize(("mode", "stage"), CELLS)
def test_training_changes_the_trained_tensors_and_no_others(make_recipe: MakeRecipe, mode: str, stage: str) -> None:
    base = BaseModel(make_recipe(rollout=JUDGED, stage=stage, tuning=MODES[mode]))
    before, start = frozen(base.model), {name: p.detach().clone() for name, p in base.trainable_parameters.items()}
    step(base)
    outputs(base.model)
    step(base)
    assert all(not torch.equal(p, start[name]) for name, p in base.trainable_parameters.items())
    after = frozen(base.model)
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


TRAINED = [
    *((MODES[mode], stage, row + column) for row, mode in enumerate(MODES) for column, stage in enumerate(HEADS)),
    *(
        ({"mode": mode, "lora": {"r": 4, **variant}}, "sft", row + column)
        for row, mode in enumerate(("lora", "qlora"))
        for column, variant in enumerate(VARIANTS.values())
    ),
]
"""With a number: its being odd changes from each mode, stage and variant to the next."""


@pytest.mark.parametrize(
    ("tuning", "stage", "dtype"),
    [(tuning, stage, ("float32", "bfloat16")[number % 2]) for tuning, stage, number in TRAINED],
)
def test_every_trained_tensor_has_a_gradient_before_and_after_an_evaluation(
    make_recipe: MakeRecipe, tuning: Any, stage: str, dtype: str
) -> None:
    base = BaseModel(make_recipe(model={"dtype": dtype}, rollout=JUDGED, stage=stage, tuning=tuning))
    step(base)  # until then lora_A has none, as lora_B is 0, and the layers have none of a value head of 0
    for _ in range(2):
        base.model.train()
        base.model.zero_grad()
        loss(base).backward()
        without = [n for n, p in base.trainable_parameters.items() if p.grad is None or not p.grad.abs().max() > 0]
        assert without == []
        outputs(base.model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_untrained_adapter_changes_nothing(make_recipe: MakeRecipe, tiny_model: Path, variant: str) -> None:
    base = BaseModel(make_recipe(tuning={"mode": "lora", "lora": {"r": 4, **VARIANTS[variant]}}))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (outputs(base.model) - outputs(plain)).abs().max() < 1e-5


@pytest.mark.parametrize("variant", ["gaussian", "pissa", "olora"])
@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_every_site_starts_with_the_same_bits(make_recipe: MakeRecipe, mode: str, variant: str) -> None:
    recipe = make_recipe(tuning={"mode": mode, "lora": {"r": 4, **VARIANTS[variant]}})
    one, other = BaseModel(recipe), BaseModel(recipe)
    assert one.initial_state.digest == other.initial_state.digest
    assert one.initial_digest == other.initial_digest
    assert all(torch.equal(tensor, frozen(other.model)[name]) for name, tensor in frozen(one.model).items())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_four_bits_are_those_of_transformers(
    make_recipe: MakeRecipe, tiny_model: Path, quant_type: str, double_quant: bool
) -> None:
    settings = {"quant_type": quant_type, "double_quant": double_quant}
    base = BaseModel(make_recipe(model={"dtype": "bfloat16"}, tuning={"mode": "qlora", "qlora": settings}))
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16, quantization_config=config)
    expected = {n: p for n, p in theirs.named_parameters() if p.dtype == torch.uint8}
    ours = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in base.model.named_parameters()}
    assert len(expected) == 14
    for name, parameter in expected.items():
        assert torch.equal(ours[name].cpu(), parameter.cpu()), name
    assert {n for n, p in ours.items() if p.dtype == torch.uint8} == set(expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_is_as_close_as_it_should_be(double_quant: bool) -> None:
    """Blocks of 64 normal weights: RMSE 0.092 of their deviation, at most 0.152 of the block's largest."""
    from core_training.parts.tuning_modes.qlora import Qlora
    from core_training.tuning.four_bits import quantised_layer

    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 512, bias=False)
    torch.nn.init.normal_(linear.weight)
    weight = linear.weight.detach().clone()
    layer = quantised_layer(linear, Qlora(double_quant=double_quant), "float32")
    back = layer.eval()(torch.eye(512)).T.detach()
    error = (back - weight).reshape(-1, 64)
    assert abs(error.square().mean().sqrt() / weight.std() - 0.092) < 0.003
    allowed = 0.152 + (0.004 if double_quant else 0)
    assert (error.abs().amax(1) / weight.reshape(-1, 64).abs().amax(1)).max() < allowed


def test_a_model_computes_with_its_four_bit_weights(make_recipe: MakeRecipe, tiny_model: Path) -> None:
    """Equal to the plain model with every quantised weight put in its place as a float32 one."""
    from bitsandbytes.functional import dequantize_4bit

    base = BaseModel(make_recipe(tuning={"mode": "qlora"}))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    own = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in base.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if own[name].dtype == torch.uint8:
                parameter.copy_(dequantize_4bit(own[name].data, own[name].quant_state))
    assert (outputs(base.model) - outputs(plain)).abs().max() < 1e-4


@pytest.fixture(scope="module")
def deep_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2,
        tie_word_embeddings=False,
    ))  # fmt: skip


@pytest.mark.parametrize(("count", "expected"), [(2, [10, 11]), (-2, [0, 1]), (-1, [0]), (12, [*range(12)])])
def test_freeze_counts_layers_by_their_place(
    make_recipe: MakeRecipe, deep_model: LlamaForCausalLM, count: int, expected: list[int]
) -> None:
    recipe = make_recipe(tuning={"mode": "freeze", "freeze": {"trainable_layers": count}})
    FreezeTuning(recipe).apply(deep_model)
    assert {n for n, p in deep_model.named_parameters() if p.requires_grad} == layers(*expected)


def test_freeze_counts_the_layers_of_the_decoder(make_recipe: MakeRecipe) -> None:
    """Whisper's and BART's configurations call those of the encoder, which is not there, the hidden ones."""
    for family in ("whisper", "bart"):
        config = tiny_config(family, 50, encoder_layers=2, decoder_layers=3)
        model = AutoModelForCausalLM.from_config(config)
        FreezeTuning(make_recipe(tuning={"mode": "freeze", "freeze": {"trainable_layers": 1}})).apply(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all("layers.2." in name for name in trained)


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        ({"mode": "freeze", "freeze": {"trainable_layers": 3}}, "trainable_layers: 3, but this model has 2 layers"),
        ({"mode": "freeze", "freeze": {"trainable_modules": ["attention"]}},
         "trainable_modules: no 'attention'; a layer of this model has .*mlp.*self_attn"),
        ({"mode": "freeze", "freeze": {"extra_modules": ["q_proj"]}},
         "extra_modules: no 'q_proj'; outside its layers this model has embed_tokens, lm_head, norm"),
        ({"mode": "freeze", "freeze": {"trainable_layers": 0}}, "nothing is left to train"),
        ({"mode": "lora", "lora": {"target_modules": ["q_proj", "query"]}},
         "target_modules: 'query' does not fit this model; it has .*q_proj"),
        ({"mode": "lora", "lora": {"modules_to_save": ["embeddings"]}}, "modules_to_save: 'embeddings' does not fit"),
        ({"mode": "lora", "lora": {"modules_to_save": ["layers"]}}, r"modules_to_save: \['layers'\] does not fit"),
        ({"mode": "lora", "lora": {"modules_to_save": ["layers"], "target_modules": ["embed_tokens"]}},
         r"modules_to_save: \['layers'\] does not fit this model \(modules_to_save cannot be applied to .*ModuleList"),
        ({"mode": "lora", "lora": {"target_modules": ["mlp"]}}, r"target_modules: \['mlp'\] does not fit"),
        ({"mode": "lora", "lora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}},
         "use_dora: .* model.embed_tokens, an embedding, the padding token's is 0; leave it out of target_modules"),
        ({"mode": "lora", "lora": {"target_modules": ["lm_head"], "init_lora_weights": "pissa"}},
         "init_lora_weights: pissa takes its start out of lm_head, which is embeddings and output layer at once"),
        ({"mode": "lora", "lora": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}},
         "target_modules: lm_head is embeddings and output layer at once, and modules_to_save trains it"),
        ({"mode": "qlora", "lora": {"r": 20, "init_lora_weights": "pissa"}}, "r: 20 is more than the 16 that"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_named(make_recipe: MakeRecipe, tuning: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        BaseModel(make_recipe(tuning=tuning))


def test_olora_is_refused_where_weights_lie_the_other_way_round(make_recipe: MakeRecipe) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(InputError, match=r"init_lora_weights: PEFT's olora does not fit .*c_attn, a Conv1D"):
        LoraTuning(make_recipe(tuning={"lora": {"init_lora_weights": "olora"}})).apply(model)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("lora", "target_modules"),
        ("lora", "modules_to_save"),
        ("freeze", "trainable_modules"),
        ("freeze", "extra_modules"),
    ],
)
def test_a_modules_name_is_not_empty(make_recipe: MakeRecipe, section: str, key: str) -> None:
    with pytest.raises(InputError, match=rf"tuning.{section}.{key}.0: string should have at least 1 character"):
        make_recipe(tuning={section: {key: [""]}})


def test_the_fixed_tokens_are_in_the_vocabulary(make_recipe: MakeRecipe) -> None:
    assert len(BaseModel(make_recipe()).tokenizer) > int(IDS.max())


PRECISE: dict[str, dict[str, Any]] = {
    "full": MODES["full"],
    "freeze": MODES["freeze"],
    "modules": {"mode": "lora", "lora": {"r": 4, "modules_to_save": ["norm"]}},
}
"""Tunings that train weights which a bfloat16 model holds."""
BFLOAT16 = {"dtype": "bfloat16"}


@pytest.mark.parametrize("name", PRECISE)
def test_small_steps_are_not_rounded_away_in_bfloat16(make_recipe: MakeRecipe, name: str) -> None:
    def share_moved(dtype: str) -> float:
        training = {"learning_rate": None, "lr_scheduler_type": "constant", "max_steps": 20}
        engine = open_engine(make_recipe(model={"dtype": dtype}, tuning=PRECISE[name], training=training))
        engine.train(20)
        tensors = zip(engine.initial_state.tensors(), engine.read_state().tensors(), strict=True)
        moved = [(a != b).mean() for (tensor, a), (_, b) in tensors if "lora_" not in tensor]
        engine.close()
        return float(sum(moved) / len(moved))

    assert share_moved("bfloat16") > 0.99 * share_moved("float32") > 0.9


@pytest.mark.parametrize("name", PRECISE)
def test_a_bfloat16_model_trains_float32_weights_and_computes_in_bfloat16(make_recipe: MakeRecipe, name: str) -> None:
    base = BaseModel(make_recipe(model=BFLOAT16, tuning=PRECISE[name]))
    for parameter in base.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert base.model(input_ids=IDS).logits.dtype == torch.bfloat16
    sampled = base.model.generate(
        input_ids=IDS, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert all(torch.equal(logits, logits.bfloat16().float()) for logits in sampled.logits)
    single = BaseModel(make_recipe(tuning=PRECISE[name]))
    assert (outputs(base.model) - outputs(single.model)).abs().max() < 0.02


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_adapters_on_a_bfloat16_model_compute_as_peft_has_them(make_recipe: MakeRecipe, mode: str) -> None:
    base = BaseModel(make_recipe(model=BFLOAT16, tuning=MODES[mode]))
    assert "forward" not in vars(innermost(base.model))


def test_deepspeed_keeps_its_own_float32_copies(make_recipe: MakeRecipe) -> None:
    base = BaseModel(make_recipe(model=BFLOAT16, tuning=MODES["full"], deepspeed={"processes": 2}))
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", PRECISE)
def test_a_bfloat16_run_with_a_break_and_recomputed_activations_ends_with_the_same_bits(
    make_recipe: MakeRecipe, tmp_path: Path, name: str
) -> None:
    recipe, thrifty = (
        make_recipe(model=BFLOAT16, tuning=PRECISE[name], training={"max_steps": 4, "gradient_checkpointing": thrifty})
        for thrifty in (False, True)
    )
    straight, before, after = open_engine(recipe), open_engine(thrifty), open_engine(thrifty)
    straight.train(4)
    before.train(2)
    before.checkpoint(tmp_path / "checkpoint")
    after.restore(tmp_path / "checkpoint")
    after.train(2)
    assert after.read_state().digest == straight.read_state().digest
    assert after.evaluate() == straight.evaluate()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_hooks_do_not_pile_up_on_a_shared_model(make_recipe: MakeRecipe, mode: str) -> None:
    first = open_engine(make_recipe(tuning=MODES[mode], training={"gradient_checkpointing": True}))
    for _ in range(3):
        engine = Engine(first._stage, load_dataset(first._recipe, first._stage))
        engine.launch()
        engine.close()
    assert len(first._base.model.get_input_embeddings()._forward_hooks) == 1


@pytest.mark.parametrize(
    ("tuning", "changed"),
    [
        ({"mode": "full"}, False),
        ({"mode": "freeze"}, False),
        ({"mode": "lora"}, False),
        ({"mode": "lora", "lora": {"init_lora_weights": "pissa"}}, True),
        ({"mode": "qlora", "lora": {"init_lora_weights": "gaussian"}}, False),
        ({"mode": "qlora", "lora": {"init_lora_weights": "olora"}}, True),
    ],
)
def test_frozen_weights_enter_the_digest_where_the_trained_ones_start_with_a_part_of_them(
    make_recipe: MakeRecipe, tuning: Any, changed: bool
) -> None:
    assert load_tuning(make_recipe(tuning=tuning)).changes_frozen == changed
