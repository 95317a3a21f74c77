"""Examples share a row only in models that keep them apart there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core_training.engine.dataset import load_dataset
from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.models.reading import reading_of
from tests import tiny
from tests.families.building import make_family

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 64}
CONFIGS = {
    "llama": (transformers.LlamaConfig, {**WIDE, "num_key_value_heads": 2}, True),
    "gpt_neox": (transformers.GPTNeoXConfig, WIDE, True),
    "mixtral": (transformers.MixtralConfig, {**WIDE, "num_key_value_heads": 2, "num_local_experts": 4}, True),
    "opt": (transformers.OPTConfig, {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}, False),
    "bloom": (transformers.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
    "mamba": (transformers.MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, False),
}


def model_of(kind: str, vocabulary: int, dtype: torch.dtype = torch.float32) -> Any:
    config, sizes, _ = CONFIGS[kind]
    torch.manual_seed(0)
    settings = config(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    return transformers.AutoModelForCausalLM.from_config(settings).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_keeps_examples_apart_exactly_when_the_first_one_leaves_the_second_alone(
    kind: str, dtype: torch.dtype
) -> None:
    model = model_of(kind, 50, dtype)
    found = reading_of(model, "").keeps_examples_apart
    assert found == CONFIGS[kind][2]
    with torch.no_grad():
        for parameter in model.float().parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # so that small random weights show what they look at
        row = torch.arange(24).unsqueeze(0)
        other = torch.where(row < 12, 49 - row, row)
        one, two = (model(input_ids=ids, position_ids=row % 12, use_cache=False).logits[:, 12:] for ids in (row, other))
    assert found == (float((one - two).abs().max()) < 1e-4 * float(one.std()))


def test_looking_leaves_the_model_as_it_was() -> None:
    model = model_of("llama", 50)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reading_of(model, "")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(("batch_size", "packs"), [(1, True), (2, False)])
def test_attention_that_heeds_the_positions_of_a_lone_row_only_packs_no_more_than_one(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int, packs: bool
) -> None:
    """So does FlashAttention, as transformers calls it; this one stands for it on a machine without a GPU."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def heeding_a_lone_row(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, mask if len(query) == 1 else None, **settings)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", heeding_a_lone_row)
    recipe = make_recipe(training={"packing": None, "per_device_train_batch_size": batch_size})
    assert (max(map(len, load_dataset(recipe, tiny.stage_of(recipe)).rows)) > 1) == packs


def test_a_model_that_reads_more_than_tokens_is_refused(make_recipe: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Gemma 4's assistant reads the states of the model that it drafts for."""
    folder = make_family("gemma4_assistant", tiny_model, tmp_path / "assistant")
    said = "model.name_or_path: .*: a Gemma4AssistantForCausalLM reads something else than tokens: .*shared_kv_states"
    with pytest.raises(InputError, match=said):
        open_engine(make_recipe(model={"name_or_path": str(folder)}))


def test_attention_that_cannot_train_here_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU can")
    model = model_of("llama", 50)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(InputError, match="flex_attention cannot train without a GPU"):
        reading_of(model, "")


@pytest.fixture
def bloom(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder whose model does not keep examples apart, with the tiny model's tokenizer."""
    folder = tmp_path / "bloom"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    model_of("bloom", 400).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_unset_packing_is_on_where_the_model_can(make_recipe: Any, mode: str) -> None:
    recipe = make_recipe(training={"packing": None}, tuning={"mode": mode})
    assert max(map(len, load_dataset(recipe, tiny.stage_of(recipe)).rows)) > 1


def test_unset_packing_is_off_where_the_model_cannot(make_recipe: Any, bloom: Path) -> None:
    recipe = make_recipe(model={"name_or_path": str(bloom)}, training={"packing": None})
    assert set(map(len, load_dataset(recipe, tiny.stage_of(recipe)).rows)) == {1}


def test_packed_rows_fit_the_models_context(make_recipe: Any) -> None:
    """Models with learned positions have none for what comes after."""
    recipe = make_recipe(training={"packing": True, "max_length": 1000})
    rows = load_dataset(recipe, tiny.stage_of(recipe)).rows
    assert 200 < max(len(tiny.token_ids(row)) for row in rows) <= 256


def test_packing_that_the_model_cannot_do_is_refused(make_recipe: Any, bloom: Path) -> None:
    recipe = make_recipe(model={"name_or_path": str(bloom)}, training={"packing": True})
    with pytest.raises(InputError, match=r"^training\.packing: models of type bloom do not keep .* set it to false"):
        load_dataset(recipe, tiny.stage_of(recipe))
