"""What `fedloom export` writes is what other tools load, and computes what was trained."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from core_training.foundation.errors import InputError
from core_training.models.results import find_result, load_result
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from simulations import simulate
from tests import tiny
from tests.core_training.tuned import JUDGED, finished, outputs
from tests.fedloom.conftest import Command

Finished = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]
IDS = torch.arange(5, 45).reshape(2, 20)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


def digest_of(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["state_digest"])


@pytest.mark.parametrize("kind", ["central", "federated"])
def test_an_adapter_is_what_peft_loads_and_merged_it_computes_the_same(
    fedloom: Command, finished_run: Finished, tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    run = finished_run(kind)
    outcome = fedloom("export", run, "--to", tmp_path / "adapter", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == {
        "folder": str(tmp_path / "adapter"), "kind": "adapter", "base": str(tiny_model), "tokenizer": True
    }  # fmt: skip
    assert fedloom("export", run, "--to", tmp_path / "merged", "--merge").code == 0
    with_adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert type(merged) is type(base)
    assert (logits(with_adapter) - logits(merged)).abs().max() < 1e-5
    assert (logits(merged) - logits(base)).abs().max() > 1e-2
    for folder in ("adapter", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
        assert (
            tokenizer("fever of the heart")["input_ids"]
            == AutoTokenizer.from_pretrained(tiny_model)("fever of the heart")["input_ids"]
        )
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize(("kind", "mode"), [("central", "lora"), ("federated", "lora"), ("central", "full")])
def test_a_result_is_loaded_with_the_state_that_the_run_ended_with(
    finished_run: Finished, kind: str, mode: str
) -> None:
    from core_training.models.parameters import read_parameters

    run = finished_run(kind, mode)
    assert read_parameters(load_result(find_result(run)).trainable_parameters).digest == digest_of(run)


def test_a_wholly_trained_model_is_written_whole(fedloom: Command, finished_run: Finished, tmp_path: Path) -> None:
    run = finished_run(mode="full")
    outcome = fedloom("export", run, "--to", tmp_path / "model", "--json")
    assert (outcome.code, json.loads(outcome.out)["kind"]) == (0, "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (logits(exported) - logits(load_result(find_result(run)).model)).abs().max() == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_whole_model_has_the_dtype_of_its_base(
    fedloom: Command, finished_run: Finished, tmp_path: Path, mode: str
) -> None:
    assert fedloom("export", finished_run(mode=mode, dtype="bfloat16"), "--to", tmp_path / "m", "--merge").code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("tuning", ["full", "freeze", "modules"])
def test_a_bfloat16_run_is_read_back_exactly_and_exported_rounded(
    fedloom: Command, make_recipe: MakeRecipe, tmp_path: Path, stage: str, tuning: str
) -> None:
    settings = {"mode": "lora", "lora": {"modules_to_save": ["norm"]}} if tuning == "modules" else {"mode": tuning}
    ended = finished(
        make_recipe(model={"dtype": "bfloat16"}, rollout=JUDGED, stage=stage, tuning=settings), tmp_path / "run"
    )
    assert torch.equal(outputs(load_result(find_result(tmp_path / "run")).model), outputs(ended.model))
    assert fedloom("export", tmp_path / "run", "--to", tmp_path / "model", "--merge").code == 0
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {n for n, t in tensors.items() if t.dtype != torch.bfloat16} == (
        {"score.weight"} if stage == "reward" else set()
    )
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    exported = kind.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert (outputs(exported) - outputs(ended.model)).abs().max() < 0.05


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa-rslora-dora": {"init_lora_weights": "pissa", "use_rslora": True, "use_dora": True},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "tied": {"target_modules": ["embed_tokens", "lm_head"]},
    "layers": {"modules_to_save": ["norm", "o_proj"], "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [("sft", name) for name in ADAPTERS] + [("ppo", "plain"), ("reward", "plain"), ("reward", "dora")],
)
def test_every_adapter_computes_the_same_under_peft(
    fedloom: Command, make_recipe: MakeRecipe, tmp_path: Path, stage: str, adapter: str
) -> None:
    """On the base as it lies on disk, and merged into it."""
    recipe = make_recipe(rollout=JUDGED, stage=stage, tuning={"lora": {"r": 4, **ADAPTERS[adapter]}})
    ended = finished(recipe, tmp_path / "run")
    for arguments in (["--to", tmp_path / "adapter"], ["--to", tmp_path / "merged", "--merge"]):
        outcome = fedloom("export", tmp_path / "run", *arguments)
        assert outcome.code == 0, outcome.err
    if stage == "reward":
        peft = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
        peft.config.pad_token_id = 0
        whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    else:
        peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (outputs(peft) - outputs(ended.model)).abs().max() < 1e-5
    assert (outputs(whole) - outputs(ended.model)).abs().max() < 1e-5
    weights = {p.name for p in (tmp_path / "adapter").glob("*.safetensors")}
    assert weights - {"value_head.safetensors"} == {"adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] in (
        True,
        "gaussian",
    )


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("mode", ["full", "freeze"])
def test_wholly_trained_weights_are_a_model_that_transformers_loads(
    fedloom: Command, make_recipe: MakeRecipe, tmp_path: Path, mode: str, stage: str
) -> None:
    tuning = {"mode": mode, "freeze": {"trainable_layers": 1}}
    ended = finished(make_recipe(rollout=JUDGED, stage=stage, tuning=tuning), tmp_path / "run")
    assert fedloom("export", tmp_path / "run", "--to", tmp_path / "model").code == 0
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    for folder in (tmp_path / "model", tmp_path / "run" / "model"):
        model, loading = kind.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        assert (outputs(model) - outputs(ended.model)).abs().max() < 1e-6


def test_a_servers_layers_and_the_base_are_exported_as_the_model_that_a_site_has(
    fedloom: Command, make_recipe: MakeRecipe, tmp_path: Path, site_files: list[Path]
) -> None:
    """The server knows no frozen weight; a simulation, which has the base, takes the whole model over from a site."""
    recipe = make_recipe(
        tuning={"mode": "freeze", "freeze": {"trainable_layers": 1}},
        topology={"kind": "federated", "rounds": 1, "local_steps": 1},
        simulation={"sites": [str(site_files[0])]},
    )
    run = RunFolder(tmp_path / "run")
    simulate(recipe, run)
    assert {path.name for path in (run.path / "layers").iterdir()} == {"layers.safetensors", "fedloom.json"}
    whole = load_file(run.path / "model" / "model.safetensors")
    shutil.rmtree(run.path / "model")
    assert fedloom("export", run.path, "--to", tmp_path / "model").code == 0
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in exported.items())


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_four_bit_run_gives_an_adapter_for_the_quantised_base_and_a_model_of_the_whole_one(
    fedloom: Command, make_recipe: MakeRecipe, tmp_path: Path, tiny_model: Path, stage: str
) -> None:
    dtype = {"model": {"dtype": "bfloat16"}, "stage": stage}
    ended = finished(make_recipe(**dtype, tuning={"mode": "qlora"}), tmp_path / "run")
    plain = finished(make_recipe(**dtype, tuning={"mode": "lora"}), tmp_path / "plain")  # to the same state
    assert fedloom("export", tmp_path / "run", "--to", tmp_path / "adapter").code == 0
    assert fedloom("export", tmp_path / "run", "--to", tmp_path / "merged", "--merge").code == 0
    assert fedloom("export", tmp_path / "plain", "--to", tmp_path / "plain-merged", "--merge").code == 0
    merged, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "plain-merged"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    assert {n for n, t in merged.items() if t.dtype != torch.bfloat16} == (
        {"score.weight"} if stage == "reward" else set()
    )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    settings: dict[str, Any] = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": "cpu"}
    if stage == "reward":
        peft = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1, **settings)
        peft.config.pad_token_id = 0
    else:
        peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **settings)
    for module in peft.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its packing wants wider layers than these
    near, far = (float((outputs(model) - outputs(ended.model)).abs().max()) for model in (peft, plain.model))
    assert near < min(0.05, far / 3), (near, far)


def test_the_adapter_of_a_run_that_started_from_another_is_not_written_alone(
    fedloom: Command, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    finished(make_recipe(), tmp_path / "first")
    ended = finished(make_recipe(model={"adapters": [str(tmp_path / "first")]}), tmp_path / "run", seed=1)
    outcome = fedloom("export", tmp_path / "run", "--to", tmp_path / "adapter")
    assert (outcome.code, "write the whole model with --merge" in outcome.err) == (2, True)
    assert fedloom("export", tmp_path / "run", "--to", tmp_path / "merged", "--merge").code == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (outputs(whole) - outputs(ended.model)).abs().max() < 1e-5
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].endswith("with 1 earlier runs merged in")


@pytest.mark.parametrize("mode", ["full", "freeze", "lora", "qlora"])
def test_one_can_talk_with_every_mode(fedloom: Command, make_recipe: MakeRecipe, tmp_path: Path, mode: str) -> None:
    finished(make_recipe(rollout=JUDGED, stage="ppo", tuning={"mode": mode}), tmp_path / "run")
    outcome = fedloom("chat", tmp_path / "run", "--prompt", "fever?", "--json", "--max-tokens", 2)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["tokens"] <= 2


def test_nobody_talks_with_a_reward_model(fedloom: Command, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    finished(make_recipe(stage="reward"), tmp_path / "run")
    outcome = fedloom("chat", tmp_path / "run", "--prompt", "fever?")
    assert (outcome.code, "is a reward model: it scores answers and gives none" in outcome.err) == (2, True)


@pytest.fixture
def run_of_strangers(finished_run: Finished, tmp_path: Path) -> Path:
    """A federation's run folder: the recipe names the base model, and it is no folder here."""
    run = tmp_path / "run"
    shutil.copytree(finished_run("federated"), run)
    recipe = (run / "recipe.yaml").read_text().splitlines()
    index = next(i for i, line in enumerate(recipe) if line.startswith("  name_or_path:"))
    recipe[index] = "  name_or_path: ward-model"
    (run / "recipe.yaml").write_text("\n".join(recipe))
    return run


def test_a_run_whose_base_model_is_elsewhere_gives_its_adapter(
    fedloom: Command, run_of_strangers: Path, tiny_model: Path, tmp_path: Path
) -> None:
    outcome = fedloom("export", run_of_strangers, "--to", tmp_path / "adapter", "--json")
    assert (outcome.code, json.loads(outcome.out)["tokenizer"]) == (0, False)
    assert json.loads(outcome.out)["base"] == "ward-model"
    refused = fedloom("export", run_of_strangers, "--to", tmp_path / "merged", "--merge")
    assert refused.code == 2
    assert "the base model 'ward-model' is not here; name it with --base DIR" in refused.err
    assert "model get" not in refused.err
    assert not (tmp_path / "merged").exists()
    arguments = ("export", run_of_strangers, "--to", tmp_path / "merged", "--merge", "--base", tiny_model)
    assert fedloom(*arguments).code == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_another_base_model_than_the_trained_one_is_refused(
    fedloom: Command, finished_run: Finished, tmp_path: Path
) -> None:
    wider = tiny.make_model(tmp_path / "wider", width=64)
    outcome = fedloom("export", finished_run(), "--to", tmp_path / "merged", "--merge", "--base", wider)
    assert outcome.code == 2
    assert f"does not fit the base model {wider}: it was trained on a base of digest " in outcome.err
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_holds_something_is_never_written_to(
    fedloom: Command, finished_run: Finished, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    assert fedloom("export", finished_run(), "--to", tmp_path / "mine").code == 0
    (tmp_path / "file").write_text("mine")
    for merge in ([], ["--merge"]):
        outcome = fedloom("export", finished_run(), "--to", tmp_path / "mine", *merge)
        assert (outcome.code, "exists and is not empty; name a new folder" in outcome.err) == (2, True)
        outcome = fedloom("export", finished_run(), "--to", tmp_path / "file", *merge)
        assert (outcome.code, "is a file; name a new folder" in outcome.err) == (2, True)


def test_what_is_no_finished_run_is_named(fedloom: Command, finished_run: Finished, tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    shutil.copy(finished_run() / "recipe.yaml", tmp_path / "unfinished")
    (tmp_path / "other").mkdir()
    for name, expected in (
        ("absent", "absent: no such run folder"),
        ("other", "other: not a run folder (it has no recipe.yaml)"),
        ("unfinished", "there is no result yet (adapter/): the run has not completed; --resume goes on with it"),
    ):
        outcome = fedloom("export", tmp_path / name, "--to", tmp_path / "to")
        assert outcome.code == 2
        assert expected in outcome.err
    outcome = fedloom("export", finished_run(), "--to", tmp_path / "to", "--base", tmp_path / "absent")
    assert (outcome.code, "--base: " in outcome.err) == (2, True)


@pytest.mark.parametrize("mixing", ["group", "metropolis"])
def test_the_sites_of_a_gossip_simulation_have_one_result_or_each_its_own(
    finished_run: Finished, tmp_path: Path, mixing: str
) -> None:
    """Laid out as a gossip simulation leaves it: results under `sites/`, one digest or none in the summary."""
    central = finished_run()
    summary = json.loads((central / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(
        json.dumps({**summary, "state_digest": summary["state_digest"] if mixing == "group" else None})
    )
    shutil.copy(central / "recipe.yaml", tmp_path)
    for site in ("a", "b"):
        shutil.copytree(central / "adapter", tmp_path / "sites" / site / "simulation" / "adapter")
    assert find_result(tmp_path, site="b").folder == tmp_path / "sites" / "b" / "simulation" / "adapter"
    if mixing == "group":
        assert find_result(tmp_path).folder == tmp_path / "sites" / "a" / "simulation" / "adapter"
    for wrong in ["c"] if mixing == "group" else ["c", None]:
        with pytest.raises(InputError, match="--site: each site has a result of its own; choose one of a, b"):
            find_result(tmp_path, site=wrong)


def test_a_damaged_result_is_refused(fedloom: Command, finished_run: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished_run(), tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    outcome = fedloom("export", tmp_path / "run", "--to", tmp_path / "to", "--merge")
    assert outcome.code == 2
    assert "adapter_model.safetensors cannot be read" in outcome.err
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"base_digest": 5}, "base_digest: Input should be a valid string"),
        ({"copies": ["a"]}, "copies: Input should be an object"),
        ({"copies": {"a": ["b"]}}, "copies.a: Input should be a valid string"),
        ({"extra": 1}, "extra: Unexpected keyword argument"),
        ({"copies": {"a": "b"}}, "copies: 'a' cannot be a copy of 'b' here"),
        ({"copies": {"model.norm.weight": "model.norm.weight"}}, "'model.norm.weight' cannot be a copy of"),
    ],
)
def test_what_a_site_says_of_a_result_is_not_trusted(
    fedloom: Command, make_recipe: MakeRecipe, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    finished(make_recipe(tuning={"lora": {"modules_to_save": ["norm"]}}), tmp_path / "run")
    origin = tmp_path / "run" / "adapter" / "fedloom.json"
    origin.write_text(json.dumps(json.loads(origin.read_text()) | change))
    outcome = fedloom("export", tmp_path / "run", "--to", tmp_path / "to")
    assert (outcome.code, expected in outcome.err) == (2, True), outcome.err
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_a_full_disk_leaves_no_half_of_an_export(
    fedloom: Command, finished_run: Finished, tmp_path: Path, merge: list[str]
) -> None:
    run = finished_run()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        outcome = fedloom("export", run, "--to", tmp_path / "to", *merge)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 1
    assert "could not be written" in outcome.err
    assert list(tmp_path.iterdir()) == []
