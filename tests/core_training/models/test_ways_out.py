"""Every way out of a run gives the model that was trained: files loaded by others say what the run's model said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from core_training.engine.central import train
from core_training.engine.engine import open_engine
from core_training.foundation.errors import RunError
from core_training.models import results
from core_training.models.loading import load_starting_model, load_tokenizer
from core_training.models.parameters import persistent_buffers
from core_training.models.probe import logits_of
from core_training.models.results import export_adapter, export_model, find_result, load_result, load_reward_model
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from tests import tiny
from tests.core_training import preference_data
from tests.families.building import FAMILIES, make_family

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(request.param, tiny_model, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture
def ended(make_recipe: MakeRecipe, tmp_path: Path, family: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Train a little; returns the run folder, and the logits of the model in memory."""

    def run(name: str, **sections: Any) -> tuple[Path, torch.Tensor]:
        recipe = make_recipe(
            **sections,
            model={"name_or_path": str(family), **sections.pop("model", {})},
            training={"max_steps": 3, "learning_rate": 1e-2, "packing": False},
            output=str(tmp_path / name),
        )
        folder = RunFolder(tmp_path / name)
        folder.prepare(recipe, resume=False)
        engine = open_engine(recipe)
        start = logits_of(engine._base.model)
        train(recipe, engine, folder)
        logits = logits_of(engine._base.model)
        assert (logits - start).abs().max() > 1e-3
        engine.close()
        return folder.path, logits

    return run


def far(model: Any, logits: torch.Tensor) -> float:
    return float((logits_of(model.eval()) - logits).abs().max())


@pytest.mark.parametrize("mode", ["full", "freeze"])
def test_a_whole_model(ended: Callable[..., Any], tmp_path: Path, mode: str) -> None:
    run, logits = ended("run", tuning={"mode": mode, "freeze": {"trainable_layers": 1}})
    export_model(find_result(run), tmp_path / "exported")
    for folder in (run / "model", tmp_path / "exported"):
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"]
        assert far(model, logits) < 1e-5
    assert far(load_result(find_result(run)).model, logits) < 1e-5


def test_an_adapter_by_itself_merged_and_as_the_start_of_the_next_run(
    ended: Callable[..., Any], tmp_path: Path, family: Path, make_recipe: MakeRecipe
) -> None:
    run, logits = ended("run", tuning={"lora": {"r": 4}})
    export_adapter(find_result(run), tmp_path / "adapter")
    export_model(find_result(run), tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family), str(tmp_path / "adapter"))
    assert far(adapted, logits) < 1e-5
    assert far(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), logits) < 1e-5
    following = make_recipe(model={"name_or_path": str(family), "adapters": [str(run)]})
    assert far(load_starting_model(following, load_tokenizer(following)).model, logits) < 1e-5


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_reward_model(ended: Callable[..., Any], tmp_path: Path, mode: str) -> None:
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", preference_data.records("reward", 0, 12))
    run, logits = ended(
        "run", stage="reward", tuning={"mode": mode, "lora": {"r": 4}}, data={"train": str(data), "columns": {}}
    )
    base = load_result(find_result(run))
    assert far(load_reward_model(run, base.vocabulary_digest), logits) < 1e-5
    if mode == "lora":
        export_adapter(find_result(run), tmp_path / "adapter")  # which looks at what it wrote


def test_an_adapter_that_does_not_say_the_same_is_not_written(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tuning={"lora": {"r": 4}}, output=str(tmp_path / "run"))
    folder = RunFolder(tmp_path / "run")
    folder.prepare(recipe, resume=False)
    engine = open_engine(recipe)
    train(recipe, engine, folder)
    engine.close()
    export_adapter(find_result(tmp_path / "run"), tmp_path / "right")
    scaled = partial(results._update_config, lora_alpha=64)
    monkeypatch.setattr(results, "_fit_to_plain_peft", lambda _, written: scaled(written))
    with pytest.raises(RunError, match="writing the adapter changed what the model says"):
        export_adapter(find_result(tmp_path / "run"), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_reward_model_is_the_same_whatever_token_pads(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    """Most published models have no token for padding, and pad with the one that ends answers."""
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", preference_data.records("reward", 0, 12))
    states = []
    for padding in ("<|pad|>", "<|eos|>"):
        model = tmp_path / padding
        shutil.copytree(tiny_model, model)
        names = json.loads((model / "tokenizer_config.json").read_text()) | {"pad_token": padding}
        (model / "tokenizer_config.json").write_text(json.dumps(names))
        recipe = make_recipe(
            stage="reward",
            model={"name_or_path": str(model)},
            tuning={"mode": "full"},
            data={"train": str(data), "columns": {}},
            output=str(tmp_path / f"run {padding}"),
        )
        folder = RunFolder(Path(recipe.output))
        folder.prepare(recipe, resume=False)
        engine = open_engine(recipe)
        states.append(train(recipe, engine, folder).state_digest)
        engine.close()
    assert states[0] == states[1]
    exported = AutoModelForSequenceClassification.from_pretrained(folder.path / "model")
    assert exported.config.pad_token_id is None
    ids = torch.tensor([[1, 7, 8, 9, 2]])  # as most answers, it ends with the token that pads
    longer = exported(input_ids=torch.tensor([[1, 7, 8, 9]])).logits
    assert exported(input_ids=ids).logits != longer
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1"):
        exported(input_ids=ids.repeat(2, 1))


@pytest.mark.parametrize("stated", [0, None])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_row_of_a_token_that_pads_is_kept_where_transformers_would_empty_it(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, stated: int | None, mode: str
) -> None:
    """Youtu's code does so when it loads a model; its embeddings are its output layer."""
    base = make_family("youtu", tiny_model, tmp_path / "base", pad_token_id=stated)
    recipe = make_recipe(
        model={"name_or_path": str(base)},
        tuning={"mode": mode},
        training={"max_steps": 2, "learning_rate": 1e-2},
        output=str(tmp_path / "run"),
    )
    folder = RunFolder(Path(recipe.output))
    folder.prepare(recipe, resume=False)
    engine = open_engine(recipe)
    train(recipe, engine, folder)
    logits, padding = logits_of(engine._base.model), engine._base.tokenizer.pad_token_id
    engine.close()
    assert logits[..., padding].all() or (stated, mode) == (0, "lora")  # an empty row, which no adapter stands on
    export_model(find_result(folder.path), tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits_of(whole), logits, atol=1e-4)
    if mode == "lora":
        export_adapter(find_result(folder.path), tmp_path / "adapter")
        plain = AutoModelForCausalLM.from_pretrained(base)
        logits_again = logits_of(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")))
        assert torch.allclose(logits_again, logits, atol=1e-4)


def test_buffers_that_training_changes_are_told_once_and_written(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a router's bias that is steered while it trains."""
    folder = make_family("deepseek_v3", tiny_model, tmp_path / "deepseek")
    recipe = make_recipe(
        model={"name_or_path": str(folder)}, tuning={"mode": "full"}, training={"max_steps": 4, "packing": False}
    )
    engine = open_engine(recipe)
    name = next(iter(persistent_buffers(engine._base.model)))

    def steer(*_: object) -> None:
        persistent_buffers(engine._base.model)[name].add_(0.1)

    steering = engine._base.model.register_forward_hook(steer)
    engine.train(2)
    engine._base.model._apply(lambda tensor: tensor.clone())  # as a move to another device does
    engine.train(2)
    assert caplog.text.count("training changes 1 buffers of the model") == 1
    assert name in caplog.text
    steering.remove()
    engine.save_model(tmp_path / "model")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(persistent_buffers(written)[name], persistent_buffers(engine._base.model)[name])
    engine.close()
