"""`fedloom recipe new` and `check`: a recipe for every stage and tuning mode, each of which trains as it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from core_training.parts.stages import STAGES
from core_training.parts.tuning_modes import TUNING_MODES
from core_training.recipe.reading import parse_recipe
from fedloom.starter_recipe import starter_recipe
from tests import tiny
from tests.fedloom.conftest import Command
from tests.test_docs import ROOT, fenced

RecipeFile = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with the columns of every stage."""
    path = tmp_path_factory.mktemp("data") / "all.jsonl"
    lines = [
        {
            "text": f"{one['question']} {one['answer']}",
            "prompt": one["question"],
            "completion": one["answer"],
            "chosen": one["answer"],
            "rejected": "No idea.",
            "label": number % 2 == 0,
        }
        for number, one in enumerate(tiny.questions(0, 16))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reward_function(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The one of docs/stages.md."""
    path = tmp_path_factory.mktemp("reward") / "rewards.py"
    path.write_text(*fenced(STAGES_PAGE, "python"), encoding="utf-8")
    return f"{path}:brevity"


@pytest.fixture
def small(tiny_model: Path, data: Path, reward_function: str, tmp_path: Path) -> Callable[[str], list[str]]:
    """Overrides that make a recipe of a stage a matter of two steps of a tiny model."""

    def overrides(stage: str) -> list[str]:
        values = {
            "model.name_or_path": tiny_model,
            "model.adapters": [],
            "data.train": data,
            "data.eval_fraction": 0.3,
            "training.per_device_train_batch_size": 2,
            "training.max_length": 48,
            "training.max_steps": 2,
            "output": tmp_path / "run",
        }
        if STAGES[stage].samples:
            values |= {
                "rollout.reward_model": "null",
                "rollout.reward_function": reward_function,
                "rollout.max_new_tokens": 3,
            }
        return [f"{key}={value}" for key, value in values.items()]

    return overrides


STAGES_PAGE = ROOT / "docs" / "stages.md"
RECIPES_SHOWN = {yaml.safe_load(body)["stage"]: body for body in fenced(STAGES_PAGE, "yaml")}


THIRD = [
    (stage, tuning)
    for row, stage in enumerate(STAGES)
    for column, tuning in enumerate(TUNING_MODES)
    if (row + column) % 3 == 0
]
"""Each stage with two tuning modes, and each mode with three or four stages; how they go together is the matrix's."""


@pytest.mark.parametrize(("stage", "tuning"), THIRD)
def test_the_recipe_of_every_stage_and_tuning_mode_trains(
    fedloom: Command, tmp_path: Path, small: Callable[[str], list[str]], stage: str, tuning: str
) -> None:
    path = tmp_path / "recipe.yaml"
    assert fedloom("recipe", "new", path, "--stage", stage, "--tuning", tuning).code == 0
    outcome = fedloom("train", path, *small(stage), "--json")
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert (summary["stage"], summary["tuning"], summary["status"]) == (stage, tuning, "completed")
    assert summary["tokens_trained"] > 0
    assert summary["eval_loss"] is not None


@pytest.mark.parametrize("topology", ["central", "federated", "gossip"])
def test_a_new_recipe_is_valid_in_every_topology_and_shows_the_learning_rate_it_would_have(topology: str) -> None:
    for stage in STAGES:
        for tuning in TUNING_MODES:
            text = starter_recipe(stage, tuning, topology)
            recipe = parse_recipe(text)
            assert (recipe.stage, recipe.tuning.mode, recipe.topology.kind) == (stage, tuning, topology)
            assert f"# learning_rate: {recipe.usual_learning_rate:g} " in text
            # What it writes out is what a recipe without it would have; a person changes what matters to them.
            least = {"model": {"name_or_path": "base"}, "stage": stage, "tuning": {"mode": tuning}}
            judge = {"rollout": {"reward_model": "runs/reward"}} if STAGES[stage].samples else {}
            plain = parse_recipe(yaml.safe_dump(least | judge))
            for section in ("tuning", "rollout", "training", "aggregation", "privacy"):
                assert getattr(recipe, section) == getattr(plain, section), section


def test_new_offers_every_stage_and_tuning_mode(fedloom: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    told = fedloom("recipe", "new", "--help").out
    assert f"[{'|'.join(STAGES)}]" in told
    assert f"[{'|'.join(TUNING_MODES)}]" in told
    wrong = fedloom("recipe", "new", "--tuning", "lorra")
    assert (wrong.code, "'qlora'" in wrong.err) == (2, True)


def test_the_page_on_stages_has_a_section_and_a_recipe_for_each() -> None:
    page = STAGES_PAGE.read_text(encoding="utf-8")
    assert set(RECIPES_SHOWN) == set(STAGES)
    for name, entry in STAGES.items():
        assert f"\n## {name}\n" in page
        (row,) = [line for line in page.splitlines() if line.startswith(f"| [`{name}`]")]
        _, _, _, reference, head, unit, rate, adapter_rate, _ = (cell.strip() for cell in row.split("|"))
        assert (float(rate), float(adapter_rate)) == (entry.learning_rate, entry.adapter_learning_rate)
        assert (unit, reference == "yes") == (entry.unit, entry.refers)
        assert head == {None: "–", "score": "score", "value_head": "value"}[entry.head]


@pytest.mark.parametrize("stage", STAGES)
def test_the_recipe_that_the_page_shows_trains(
    fedloom: Command, tmp_path: Path, small: Callable[[str], list[str]], stage: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES_SHOWN[stage], encoding="utf-8")
    outcome = fedloom("train", path, *small(stage), "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["status"] == "completed"


def test_check_says_what_a_recipe_would_do(fedloom: Command, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(starter_recipe("dpo", "lora", "federated"), encoding="utf-8")
    outcome = fedloom("recipe", "check", path, "model.adapters=[runs/sft]", "tuning.lora.r=4")
    assert outcome.code == 0
    first, *lines = outcome.out.split("  privacy\n")[0].splitlines()
    assert first == f"{path}: valid: dpo, lora, federated"
    account = {line[:15].strip(): line[15:] for line in lines}
    assert account == {
        "starts from": "path/to/base-model in float32, with runs/sft merged in; that is the reference policy of the "
        "whole run",
        "trains": "adapters of rank 4 on the linear layers and a mixture's experts, without the output layer; this is "
        "what travels, and nothing else",
        "reaches": "what adapters do not reach is told with its share when the run starts: the model is not on this "
        "machine",
        "reads": "prompt+chosen+rejected, or conversations+chosen+rejected, or messages+chosen+rejected, or "
        "instruction+chosen+rejected, or chosen+rejected",
        "minimises": "a mean over pairs; a site's update weighs as many of them as it was trained on",
        "steps": "200 steps at each site, in 40 rounds of 5 of adamw_torch, at a learning rate of up to 5e-06, as is "
        "usual for dpo with lora at a width of 4,096 (the model is not here: a narrower one gets more); times the root "
        "of the number of sites, once that is known",
        "memory": "not estimated: no model is in path/to/base-model",
    }
    assert outcome.err == ""
    machine = json.loads(fedloom("recipe", "check", path, "--json").out)
    assert machine["valid"] is True
    assert machine["recipe"]["stage"] == "dpo"
    assert machine["account"]["reads"] == account["reads"]
    assert machine["warnings"] == []
    assert machine["memory"] is None


def test_check_says_how_much_memory_a_run_will_take(
    fedloom: Command, recipe_file: RecipeFile, tiny_model: Path
) -> None:
    training = {"per_device_train_batch_size": 64, "max_length": 256}
    path = recipe_file(model={"dtype": "bfloat16"}, tuning={"mode": "freeze"}, training=training)
    memory = json.loads(fedloom("recipe", "check", path, "--json").out)["memory"]
    assert memory["loading"] > memory["weights"] > 0.45 * (tiny_model / "model.safetensors").stat().st_size
    parts = ("libraries", "weights", "trained", "step")
    assert memory["peak"] == memory["training"] == sum(memory[part] for part in parts)
    said = f"up to {memory['peak'] / 2**30:.1f} GiB on a CPU: weights 0.00, a step "
    assert f"  memory       {said}" in fedloom("recipe", "check", path).out
    federated = ["topology.kind=federated", "topology.rounds=2", "topology.local_steps=1"]
    assert "GiB on a CPU, at each site: weights" in fedloom("recipe", "check", path, *federated).out


def test_check_says_that_loading_takes_most(fedloom: Command, recipe_file: RecipeFile, tmp_path: Path) -> None:
    header = {"model.layers.0.mlp.up_proj.weight": {"shape": [2**14, 2**16], "data_offsets": [0, 2**31]}}
    content = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    widths = {"model_type": "llama", "vocab_size": 300, "hidden_size": 2**14, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(widths))
    path = recipe_file(model={"name_or_path": str(tmp_path)}, training={"max_length": 8})
    # 4 GiB of float32 weights beside the file's 2, which are given back afterwards.
    assert (
        "memory       up to 6.5 GiB on a CPU, while the model is loaded; then 4."
        in fedloom("recipe", "check", path).out
    )


def test_check_loads_no_heavy_library(tmp_path: Path, environment: dict[str, str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(starter_recipe("ppo", "qlora", "gossip"), encoding="utf-8")
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fedloom.cli", "recipe", "check", path],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
    assert "core_training.recipe.schema" in loaded
    assert not loaded & {"torch", "transformers", "peft", "bitsandbytes", "numpy", "flwr"}


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["tuning.mode=qlora", "deepspeed.processes=2", "deepspeed.stage=3"], "use deepspeed.stage 2"),
        (["dpo.beta=0.3"], "dpo: without effect under stage orpo"),
        (["rollout.temperature=0.7"], "rollout: without effect under stage orpo"),
        (["tuning.mode=full", "tuning.lora.r=4"], "tuning.lora: without effect under tuning.mode full"),
        (["tuning.qlora.quant_type=fp4"], "tuning.qlora: without effect under tuning.mode lora"),
    ],
)
def test_check_warns_of_what_is_likely_not_meant(
    fedloom: Command, tmp_path: Path, overrides: list[str], warning: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(starter_recipe("orpo", "lora", "central"), encoding="utf-8")
    outcome = fedloom("recipe", "check", path, *overrides)
    assert outcome.code == 0
    assert [line for line in outcome.err.splitlines() if line.startswith("warning: ") and warning in line]
    assert outcome.err.count("\n") == 1


def test_check_names_the_keys_of_llama_factory_that_do_nothing_here(fedloom: Command, tmp_path: Path) -> None:
    path = tmp_path / "llamafactory.yaml"
    keys = {"model_name_or_path": "base", "stage": "dpo", "dataset": "pairs", "plot_loss": True, "ddp_timeout": 5}
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    outcome = fedloom("recipe", "check", path)
    assert outcome.code == 0
    assert "without effect here: " in outcome.err
    assert "ddp_timeout" in outcome.err
    assert "plot_loss" in outcome.err
    path.write_text(yaml.safe_dump({**keys, "use_muon": True}), encoding="utf-8")
    assert fedloom("recipe", "check", path).code == 2
