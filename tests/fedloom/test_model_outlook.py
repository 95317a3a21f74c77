"""What `recipe check` says of a model's weights that adapters and four bits reach: what the run itself tells."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from core_training.models.outlook import outlook
from core_training.recipe.schema import Recipe
from core_training.tuning.base import load_tuning
from fedloom.model_outlook import Outlook, outlook_of
from tests.families.building import make_family
from tests.fedloom.conftest import Command

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("family", "tuning", "said"),
    [
        ("mixtral", {"mode": "lora"}, "adapters reach 100%"),
        ("mixtral", {"mode": "lora", "lora": {"experts": False}}, "tuning.lora.experts: true puts adapters on the exp"),
        ("mixtral", {"mode": "qlora", "lora": {"lora_dropout": 0.1}}, "Under tuning.lora.lora_dropout no adapters"),
        ("mixtral", {"mode": "lora", "lora": {"init_lora_weights": "pissa"}}, "mlp.experts.gate_up_proj ("),
        ("mixtral", {"mode": "vera", "vera": {"r": 4}}, "left out: model.layers.*.mlp.experts.gate_up_proj ("),
        ("falcon_h1", {"mode": "qlora"}, "left out: model.layers.*.mamba.out_proj.weight ("),
    ],
)
def test_what_is_said_without_weights_is_what_the_run_tells(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, family: str, tuning: dict[str, Any], said: str
) -> None:
    folder = make_family(family, tiny_model, tmp_path / family)
    recipe = make_recipe(model={"name_or_path": str(folder)}, tuning=tuning)
    reach = outlook(recipe)["reach"]
    assert said in " ".join(one.pop("said") for one in reach)
    loaded = load_tuning(recipe).reach(AutoModelForCausalLM.from_pretrained(folder))
    assert reach == [asdict(one) for one in loaded]


@pytest.mark.slow
def test_a_mixture_and_what_does_not_fit_it(
    fedloom: Command, recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    folder = make_family("mixtral", tiny_model, tmp_path / "mixtral")
    path = recipe_file(model={"name_or_path": str(folder)}, tuning={"lora": {"experts": False}})
    checked = json.loads(fedloom("recipe", "check", path, "--json").out)
    (reach,) = checked["reach"]
    assert reach["share"] < 0.5
    assert next(iter(reach["left_out"])) == "model.layers.*.mlp.experts.gate_up_proj"
    assert checked["account"]["reaches"].startswith(f"adapters reach {reach['share']:.0%} of the layers' weights; left")
    assert checked["account"]["reaches"].endswith("tuning.lora.experts: true puts adapters on the experts")
    refused = fedloom("recipe", "check", path, "tuning.lora.target_modules=[w4]", "tuning.lora.experts=null")
    assert refused.code == 2
    assert "tuning.lora.target_modules: 'w4' does not fit this model; it has" in refused.err


@pytest.mark.slow
def test_a_model_whose_shapes_cannot_be_looked_at_is_left_to_the_run(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    (folder / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    assert outlook_of(make_recipe(tuning={"mode": "full"})) is None
    later = "what adapters do not reach is told with its share when the run starts: "
    broken = outlook_of(make_recipe(model={"name_or_path": str(folder)}))
    assert broken is not None
    assert broken.words.startswith(f"{later}the model's shapes cannot be looked at (")
    assert broken.reach is None
    absent = outlook_of(make_recipe(model={"name_or_path": str(tmp_path / "absent")}))
    assert absent == Outlook(f"{later}the model is not on this machine")


@pytest.mark.slow
def test_the_command_itself_loads_no_heavy_library(
    recipe_file: Callable[..., Path], environment: dict[str, str]
) -> None:
    path = recipe_file(tuning={"mode": "qlora"})
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fedloom.cli", "recipe", "check", path],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = "adapters reach 100% of the layers' weights. four bits hold 100% of the layers' weights"
    assert f"\n  reaches      {said}\n" in told.stdout
    loaded = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
    assert "fedloom.model_outlook" in loaded
    assert not loaded & {"torch", "transformers", "peft", "bitsandbytes", "numpy", "flwr"}
