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
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core_training.errors import InputError
from core_training.results import find_result, load_result
from tests import tiny
from tests.fedloom.conftest import Command

Finished = Callable[..., Path]
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
    from core_training.parameters import read_parameters

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
    assert "the base model 'ward-model' is no folder here; name it with --base DIR" in refused.err
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
    assert f"does not fit the base model {wider}: tensor '" in outcome.err
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
