"""Tokens that a recipe adds: trained in every mode that can, and in every result that others load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from core_training.engine.central import train
from core_training.engine.dataset import load_dataset
from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.loading import load_starting_model, load_tokenizer
from core_training.models.outline import Outline
from core_training.models.probe import logits_of
from core_training.models.results import export_adapter, export_model, find_result
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from tests import tiny
from tests.families.building import make_family

MakeRecipe = Callable[..., Recipe]
ADDED = ["<|im_start|>", "<|im_end|>"]
BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3_text", "mixtral"])
def family(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(request.param, tiny_model, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture
def recipe_of(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """A recipe whose chat template closes turns with an added token, which its records so have."""

    def recipe(family: Path, name: str = "run", **sections: Any) -> Recipe:
        model = {
            "name_or_path": str(family),
            "add_tokens": ADDED,
            "chat_template": "chatml",
            **sections.pop("model", {}),
        }
        training = {"max_steps": 3, "learning_rate": 1e-2, "packing": False, "max_length": 128}
        return make_recipe(model=model, training=training, output=str(tmp_path / name), **sections)

    return recipe


def ended(recipe: Recipe) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Train a little; returns the run folder, the model's logits, and how far each of the added rows has moved."""
    folder = RunFolder(Path(recipe.output))
    folder.prepare(recipe, resume=False)
    engine = open_engine(recipe)
    base = engine._base
    rows = base.tokenizer.convert_tokens_to_ids(ADDED)
    before = base.model.get_input_embeddings().weight[rows].detach().clone()
    train(recipe, engine, folder)
    logits = logits_of(base.model)
    moved = (base.model.get_input_embeddings().weight[rows].detach() - before).abs().amax(dim=1)
    engine.close()
    return folder.path, logits, moved


def far(model: Any, logits: torch.Tensor) -> float:
    return float((logits_of(model.eval()) - logits).abs().max())


def test_rows_beside_adapters_are_trained_and_travel_with_them(
    recipe_of: MakeRecipe, family: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(family, tuning={"lora": {"r": 4}})
    run, logits, moved = ended(recipe)
    assert (moved > 1e-4).all()
    assert load_tokenizer(recipe).convert_tokens_to_ids(ADDED) == [400, 401]
    export_adapter(find_result(run), tmp_path / "adapter")
    export_model(find_result(run), tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(family)
    plain.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "adapter")))
    assert far(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")), logits) < 1e-5
    assert far(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), logits) < 1e-5
    following = recipe_of(family, "next", model={"adapters": [str(run)]})
    assert far(load_starting_model(following, load_tokenizer(following)).model, logits) < 1e-5
    _, _, moved = ended(following)
    assert (moved > 1e-4).all()


def test_rows_beside_a_quantised_base_are_trained(recipe_of: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    run, _, moved = ended(recipe_of(tiny_model, tuning={"mode": "qlora", "lora": {"r": 4}}))
    assert (moved > 1e-4).all()
    export_model(find_result(run), tmp_path / "merged")


def test_a_whole_model_has_the_rows_and_its_tokenizer_the_tokens(recipe_of: MakeRecipe, family: Path) -> None:
    run, logits, moved = ended(recipe_of(family, tuning={"mode": "full"}))
    assert (moved > 1e-4).all()
    assert far(AutoModelForCausalLM.from_pretrained(run / "model"), logits) < 1e-5
    assert AutoTokenizer.from_pretrained(run / "model").convert_tokens_to_ids(ADDED) == [400, 401]


def test_added_rows_begin_alike_whatever_the_seed(recipe_of: MakeRecipe, family: Path) -> None:
    digests = set()
    for seed in (0, 1):
        recipe = recipe_of(family)
        start = BaseModel(recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": seed})}))
        digests.add(start.base_digest)
        weight = start.model.get_input_embeddings().weight.detach()
        torch.testing.assert_close(weight[400], weight[:400].mean(dim=0))
    plain = recipe_of(family, model={"add_tokens": [], "chat_template": None})
    assert len({*digests, BaseModel(plain).base_digest}) == 2


def test_a_table_with_rows_to_spare_keeps_its_size(recipe_of: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    family = make_family("llama", tiny_model, tmp_path / "roomy", vocabulary=416, tie_word_embeddings=False)
    run, logits, moved = ended(recipe_of(family, tuning={"lora": {"r": 4}}))
    assert logits.shape[-1] == 416
    assert (moved > 1e-4).all()
    export_model(find_result(run), tmp_path / "merged")
    assert far(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), logits) < 1e-5


def test_frozen_rows_are_refused_and_named(recipe_of: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    family = make_family("mixtral", tiny_model, tmp_path / "mixtral")
    tuning = {"mode": "freeze", "freeze": {"trainable_layers": 1}}
    with pytest.raises(InputError, match=r"lm_head and model\.embed_tokens would not be trained.*extra_modules"):
        BaseModel(recipe_of(family, tuning=tuning))
    tuning["freeze"] = {"trainable_layers": 1, "extra_modules": BOTH}
    run, logits, moved = ended(recipe_of(family, tuning=tuning))
    assert (moved > 1e-4).all()
    export_model(find_result(run), tmp_path / "exported")
    assert far(AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), logits) < 1e-5


def test_rows_that_are_trained_whole_need_no_others(recipe_of: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    family = make_family("mixtral", tiny_model, tmp_path / "mixtral")
    run, logits, _ = ended(recipe_of(family, tuning={"lora": {"r": 4, "modules_to_save": BOTH}}))
    export_model(find_result(run), tmp_path / "merged")
    assert far(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), logits) < 1e-5


def test_an_output_layer_with_a_bias_is_refused(recipe_of: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    """PEFT would leave the bias out, without a word."""
    family = make_family("phi", tiny_model, tmp_path / "phi")
    with pytest.raises(InputError, match=r"model\.add_tokens: rows of lm_head .*modules_to_save"):
        BaseModel(recipe_of(family))


def test_tokens_that_are_known_or_others_than_an_earlier_runs_are_named(
    recipe_of: MakeRecipe, tiny_model: Path
) -> None:
    with pytest.raises(InputError, match=r"model\.add_tokens: '<\|eos\|>' is a token of this model already"):
        BaseModel(recipe_of(tiny_model, model={"add_tokens": ["<|eos|>"]}))
    with pytest.raises(InputError, match=r"model\.add_tokens: one of them is given twice"):
        recipe_of(tiny_model, model={"add_tokens": ["a", "a"]})
    run, _, _ = ended(recipe_of(tiny_model))
    with pytest.raises(InputError, match=r"was trained with model\.add_tokens \['<\|im_start\|>'.*give it the same"):
        BaseModel(recipe_of(tiny_model, "other", model={"add_tokens": [], "adapters": [str(run)]}))


def test_an_outline_knows_them_too(recipe_of: MakeRecipe, tiny_model: Path) -> None:
    outline = Outline(recipe_of(tiny_model))
    assert outline.end_tokens[-1] == 401
    stage = tiny.stage_of(recipe_of(tiny_model))
    assert stage.base.end_tokens == outline.end_tokens


def test_a_token_that_nobody_added_stays_without_a_row(recipe_of: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    """A tokenizer may know one token more than the model: the added one's row makes no room for it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<unused>"])
    family = make_family("mixtral", tiny_model, tmp_path / "mixtral")
    tokenizer.save_pretrained(family)
    starts = [BaseModel(recipe_of(family, tuning={"mode": "full"})) for _ in range(2)]
    assert starts[0].initial_digest == starts[1].initial_digest
    weight = starts[0].model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(weight[400], weight[:400].mean(dim=0))
    starts[0].check_tokens(np.array([5, 401, 402]), "here")
    for base in (starts[0], Outline(recipe_of(family))):
        with pytest.raises(InputError, match="here: token 400 is one of the tokenizer's 403"):
            base.check_tokens(np.array([5, 400, 402]), "here")


def test_markers_are_special_and_other_tokens_are_text(recipe_of: MakeRecipe, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(recipe_of(tiny_model, model={"add_tokens": [*ADDED, "<think>"]}))
    ids = tokenizer.encode("<|im_start|><think>a", add_special_tokens=False)
    assert len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"


@pytest.mark.parametrize("whole", [["embed_tokens"], ["lm_head"]])
def test_what_shares_weights_with_a_module_that_is_trained_whole_needs_no_rows(
    recipe_of: MakeRecipe, tiny_model: Path, tmp_path: Path, whole: list[str]
) -> None:
    run, logits, moved = ended(recipe_of(tiny_model, tuning={"lora": {"r": 4, "modules_to_save": whole}}))
    assert (moved > 1e-4).all()
    export_model(find_result(run), tmp_path / "merged")
    assert far(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), logits) < 1e-5


def test_an_adapter_on_the_embeddings_is_refused_by_the_key(recipe_of: MakeRecipe, tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"model\.add_tokens: rows of .*embed_tokens.*target_modules"):
        BaseModel(recipe_of(tiny_model, tuning={"lora": {"target_modules": ["q_proj", "embed_tokens"]}}))


def test_records_are_tokenised_anew_for_other_tokens(recipe_of: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    largest = []
    for tokens in ([], ["fever"]):
        recipe = recipe_of(
            tiny_model, model={"add_tokens": tokens, "chat_template": None}, data={"cache": str(tmp_path)}
        )
        rows = load_dataset(recipe, tiny.stage_of(recipe)).rows
        largest.append(max(int(row[0].sequences[0].input_ids.max()) for row in rows))
    assert largest[0] < 400
    assert largest[1] == 400
