"""`fedloom pipeline`: steps that start from each other, done once; gates; what a kill leaves."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.fedloom.conftest import Command, Outcome

WritePipeline = Callable[..., Path]


@pytest.fixture
def write_pipeline(tiny_model: Path, tmp_path: Path) -> WritePipeline:
    """A pipeline of pre-training and then, federated, fine-tuning; keyword arguments replace or add steps."""
    tiny.write_jsonl(tmp_path / "texts.jsonl", tiny.texts(0, 40))
    tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.questions(0, 40))
    model = {"name_or_path": str(tiny_model)}
    training = {"max_length": 64, "max_steps": 3, "learning_rate": 1e-3, "save_steps": 1}
    pretrain = {
        "model": model,
        "stage": "pretrain",
        "tuning": {"mode": "full"},
        "data": {"train": str(tmp_path / "texts.jsonl"), "eval_fraction": 0.2},
        "training": training,
    }
    sft = {
        "model": model,
        "stage": "sft",
        "data": {
            "train": str(tmp_path / "questions.jsonl"),
            "columns": {"prompt": "question", "completion": "answer"},
            "eval_fraction": 0.2,
        },
        "training": training,
        "topology": {"rounds": 4, "local_steps": 1},
        "simulation": {"partition": "iid", "count": 2},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(sft))

    def write(**steps: Any) -> Path:
        document: dict[str, Any] = {
            "pretrain": {"recipe": pretrain},
            "sft": {
                "recipe": "sft.yaml",
                "set": {"model.adapters": ["${pretrain}"], "topology.kind": "federated"},
                "gates": {"eval_loss": "<= pretrain + 5"},
            },
        }
        document = {name: step for name, step in (document | steps).items() if step is not None}
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / "runs"), "steps": document}, sort_keys=False))
        return path

    return write


def statuses(outcome: Outcome) -> dict[str, str]:
    return {step["name"]: step["status"] for step in json.loads(outcome.out)["steps"]}


def digest(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["state_digest"])


@pytest.mark.slow
def test_steps_are_done_once_and_again_only_when_what_they_read_has_changed(
    fedloom: Command, write_pipeline: WritePipeline, tmp_path: Path
) -> None:
    path, runs = write_pipeline(whole={"export": "${sft}", "merge": True}), tmp_path / "runs"
    first = fedloom("pipeline", path, "--json")
    assert first.code == 0, first.err
    assert statuses(first) == {"pretrain": "done", "sft": "done", "whole": "done"}
    assert json.loads((runs / "sft" / "summary.json").read_text())["topology"] == "federated"
    assert (runs / "whole" / "model.safetensors").is_file()
    assert "eval_loss" in (runs / "report.html").read_text()

    assert set(statuses(fedloom("pipeline", path, "--json")).values()) == {"skipped"}
    tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.questions(1, 40))
    planned = fedloom("pipeline", path, "--json", "--dry-run")
    assert statuses(planned) == {"pretrain": "skipped", "sft": "planned", "whole": "planned"}
    before = digest(runs / "sft")
    again = fedloom("pipeline", path, "--json")
    assert statuses(again) == {"pretrain": "skipped", "sft": "done", "whole": "done"}
    assert digest(runs / "sft") != before
    assert digest(runs / "sft.1") == before  # the earlier run is moved aside, as by train

    alone = fedloom("pipeline", path, "--json", "--only", "pretrain")
    assert statuses(alone) == {"pretrain": "done"}
    # Done anew, it ended with the same state, so what starts from it is not done again.
    assert set(statuses(fedloom("pipeline", path, "--json")).values()) == {"skipped"}
    since = fedloom("pipeline", path, "--json", "--from", "sft")
    assert statuses(since) == {"pretrain": "skipped", "sft": "done", "whole": "done"}


@pytest.mark.slow
def test_a_gate_that_fails_ends_the_pipeline_and_says_which(
    fedloom: Command, write_pipeline: WritePipeline, tmp_path: Path
) -> None:
    path = write_pipeline(sft=None, after={"export": "${pretrain}"})
    document = yaml.safe_load(path.read_text())
    document["steps"]["pretrain"]["gates"] = {"eval_loss": "<= 0.001"}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    outcome = fedloom("pipeline", path, "--json")
    assert outcome.code == 1
    assert statuses(outcome) == {"pretrain": "failed"}
    assert "a gate of step 'pretrain' did not pass: eval_loss is" in outcome.err
    assert "has to be <= 0.001" in outcome.err
    assert "did not pass" in (tmp_path / "runs" / "report.html").read_text()
    document["steps"]["pretrain"]["gates"] = {"eval_loss": "<= 100"}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    passed = fedloom("pipeline", path, "--json")
    assert statuses(passed) == {"pretrain": "skipped", "after": "done"}


@pytest.mark.slow
def test_killed_in_a_step_and_gone_on_with_it_ends_as_one_that_was_never_killed(
    fedloom: Command, write_pipeline: WritePipeline, tmp_path: Path, environment: dict[str, str]
) -> None:
    path = write_pipeline()
    assert fedloom("pipeline", path, "--out", tmp_path / "whole", "--quiet").code == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "fedloom.cli", "pipeline", str(path), "--out", str(killed), "--quiet"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any((killed / "sft" / "checkpoints").glob("round-*")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "sft" / "summary.json").exists()
    again = fedloom("pipeline", path, "--out", killed, "--json")
    assert again.code == 0, again.err
    assert statuses(again) == {"pretrain": "skipped", "sft": "done"}
    assert '"event": "resumed"' in (killed / "sft" / "events.jsonl").read_text()
    assert not (killed / "sft.1").exists()
    for step in ("pretrain", "sft"):
        assert digest(killed / step) == digest(tmp_path / "whole" / step)


def test_two_runs_are_put_together_by_a_step(fedloom: Command, write_pipeline: WritePipeline, tmp_path: Path) -> None:
    path = write_pipeline(sft=None, other=None, both={"merge": ["${a}", "${b}"], "rule": "ties", "seed": 1})
    document = yaml.safe_load(path.read_text())
    recipe = document["steps"].pop("pretrain")["recipe"]
    recipe["tuning"] = {"mode": "lora"}
    a, b = ({"recipe": recipe, "set": {"training.learning_rate": rate}} for rate in (1e-3, 2e-3))
    document["steps"] = {"a": a, "b": b, **document["steps"]}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    outcome = fedloom("pipeline", path, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "runs" / "both" / "merge.json").read_text())["rule"] == "ties"


@pytest.mark.slow
def test_a_search_is_a_step_whose_best_recipe_is_a_later_ones(
    fedloom: Command, write_pipeline: WritePipeline, tmp_path: Path
) -> None:
    search = {
        "recipe": "sft.yaml",
        "set": {"model.adapters": ["${pretrain}"]},
        "keys": {"training.learning_rate": [1e-5, 1e-2]},
        "sampler": "grid",
    }
    path = write_pipeline(
        sft=None,
        search={"tune": search, "gates": {"best.value": "<= 20"}},
        best={"recipe": "${search}/best.yaml", "gates": {"eval_loss": "<= 20"}},
    )
    assert statuses(fedloom("pipeline", path, "--json", "--dry-run"))["best"] == "planned"
    first = fedloom("pipeline", path, "--json")
    assert first.code == 0, first.err
    assert statuses(first) == {"pretrain": "done", "search": "done", "best": "done"}
    found = json.loads((tmp_path / "runs" / "search" / "search.json").read_text())["best"]
    assert json.loads((tmp_path / "runs" / "best" / "summary.json").read_text())["eval_loss"] == found["value"]
    assert set(statuses(fedloom("pipeline", path, "--json")).values()) == {"skipped"}


@pytest.mark.slow
def test_an_evaluation_is_a_step_with_gates_on_its_figures(
    fedloom: Command, write_pipeline: WritePipeline, tmp_path: Path
) -> None:
    questions = tiny.write_jsonl(tmp_path / "asked.jsonl", tiny.questions(5, 6))
    asked = {"evaluate": "${sft}", "on": str(questions), "metrics": ["loss"]}
    before = {**asked, "evaluate": "${pretrain}"}
    path = write_pipeline(before=before, after={**asked, "gates": {"loss": "<= before + 1"}})
    first = fedloom("pipeline", path, "--json")
    assert first.code == 0, first.err
    assert set(statuses(first).values()) == {"done"}
    (gate,) = json.loads(first.out)["steps"][-1]["gates"]
    told = fedloom("evaluate", tmp_path / "runs" / "sft", "--on", questions, "--metrics", "loss", "--json",
                   "--to", tmp_path / "alone")  # fmt: skip
    assert gate["value"] == json.loads(told.out)["results"][0]["metrics"]["loss"]["value"]
    assert set(statuses(fedloom("pipeline", path, "--json")).values()) == {"skipped"}
    tiny.write_jsonl(questions, tiny.questions(6, 6))
    again = statuses(fedloom("pipeline", path, "--json"))
    assert (again["sft"], again["before"], again["after"]) == ("skipped", "done", "done")


def read_figures(page: Path) -> str:
    return html.unescape(page.read_text())


@pytest.mark.slow
def test_the_report_has_what_models_came_out_like_and_leads_to_each_steps_own(
    fedloom: Command, tiny_model: Path, tmp_path: Path
) -> None:
    tiny.write_jsonl(tmp_path / "asked.jsonl", tiny.questions(5, 6))
    (tmp_path / "judge.py").write_text("def longer(prompt, first, second):\n    return len(first) - len(second)\n")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    steps = {
        "asked": {"evaluate": str(tiny_model), "against": str(other), "on": "asked.jsonl", "metrics": ["loss"]},
        "better": {
            "compare": [str(tiny_model), str(other)], "on": "asked.jsonl", "judge": "judge.py:longer", "max_tokens": 4,
        },
    }  # fmt: skip
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "runs"), "steps": steps}, sort_keys=False))
    for _ in range(2):  # the second time of what is there
        outcome = fedloom("pipeline", path, "--json")
        assert outcome.code == 0, outcome.err
        page = read_figures(tmp_path / "runs" / "report.html")
        told = json.loads((tmp_path / "runs" / "asked" / "results.json").read_text())["results"][0]["metrics"]["loss"]
        assert f"{told['value']:.3f} [{told['low']:.3f}, {told['high']:.3f}]" in page
        compared = json.loads((tmp_path / "runs" / "better" / "results.json").read_text())
        first = compared["models"][0]
        assert f"{first['rating']:.0f} [{first['low']:.0f}, {first['high']:.0f}]" in page
        assert f"won {100 * first['win_rate']:.0f} %" in page
        assert f"p {compared['pairs'][0]['p_holm']:.3g}" in page
        for name, title in (("asked", "on asked"), ("better", "compared on asked")):
            assert f'href="{name}/report.html"' in page
            assert title in read_figures(tmp_path / "runs" / name / "report.html")
    assert set(statuses(outcome).values()) == {"skipped"}


BAD = [
    ({"asked": {"evaluate": "${sft}", "on": "no.jsonl"}}, "steps.asked.on: no.jsonl: no such file"),
    ({"asked": {"evaluate": "${sft}"}}, "steps.asked.on: name at least one"),
    ({"search": {"tune": {"keys": {}}}}, "steps.search.tune: keys: name at least one"),
    ({"search": {"tune": "no.yaml"}}, "no.yaml: no such search file"),
    ({"sft": {"recipes": "sft.yaml"}}, "steps.sft: it says not what it does"),
    ({"sft": {"recipe": "sft.yaml", "sets": {}}}, "steps.sft.sets: unknown key; did you mean 'set'?"),
    ({"sft": {"recipe": "no.yaml"}}, "no.yaml: no such recipe file"),
    ({"sft": {"recipe": "sft.yaml", "set": {"training.learning_rat": 1}}}, "did you mean 'learning_rate'"),
    ({"sft": {"recipe": "sft.yaml", "set": {"topology.kind": "federated", "simulation": {}}}}, "steps are simulated"),
    ({"sft": {"recipe": "sft.yaml", "set": {"model.adapters": ["${pretrian}"]}}}, "did you mean 'pretrain'?"),
    (
        {"pretrain": {"export": "${sft}"}, "sft": {"recipe": "sft.yaml"}},
        "${sft} comes after it; put step 'sft' before step 'pretrain'",
    ),
    (
        {"pretrain": {"recipe": "sft.yaml", "set": {"model.adapters": ["${sft}"]}}, "sft": {"export": "${pretrain}"}},
        "in a circle: pretrain → sft → pretrain",
    ),
    ({"sft": {"export": "${sft}"}}, "in a circle: sft → sft"),
    ({"a b": {"recipe": "sft.yaml"}}, "'a b' is no name"),
    (
        {"sft": {"recipe": "sft.yaml", "gates": {"eval_los": "<= 1"}}},
        "no summary has a figure 'eval_los'; did you mean 'eval_loss'?",
    ),
    ({"sft": {"recipe": "sft.yaml", "gates": {"eval_loss": "<= sfft + 1"}}}, "'sfft' is no step before it"),
    ({"sft": {"recipe": "sft.yaml", "gates": {"eval_loss": "about 1"}}}, "is no gate; write '<= 3.0'"),
    ({"whole": {"export": "${sft}", "gates": {"eval_loss": "<= 1"}}}, "step 'whole' leaves no figures"),
    ({"both": {"merge": "${sft}"}}, "steps.both.merge: a list of run folders"),
    ({"both": {"merge": ["${sft}"], "rule": "tie"}}, "did you mean 'ties'?"),
    ({"sft": "sft.yaml"}, "steps.sft: a step is a mapping"),
]


@pytest.mark.parametrize(("steps", "said"), BAD, ids=[said for _, said in BAD])
def test_what_is_wrong_is_told_before_anything_is_done(
    fedloom: Command, write_pipeline: WritePipeline, tmp_path: Path, steps: dict[str, Any], said: str
) -> None:
    outcome = fedloom("pipeline", write_pipeline(**steps))
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "runs").exists()


def test_a_name_given_twice_and_steps_that_are_none_are_told(
    fedloom: Command, write_pipeline: WritePipeline, tmp_path: Path
) -> None:
    (tmp_path / "twice.yaml").write_text("steps:\n  a: {recipe: x.yaml}\n  a: {recipe: y.yaml}\n")
    twice = fedloom("pipeline", tmp_path / "twice.yaml")
    assert (twice.code, "line 3" in twice.err, "key 'a' is given twice" in twice.err) == (2, True, True)
    path = write_pipeline()
    for option in ("--from", "--only"):
        wrong = fedloom("pipeline", path, option, "stf")
        assert (wrong.code, f"{option}: there is no step 'stf'; did you mean 'sft'?" in wrong.err) == (2, True)
    early = fedloom("pipeline", path, "--only", "sft")
    assert (early.code, "refers to 'pretrain', which has no result yet" in early.err) == (2, True)
    both = fedloom("pipeline", path, "--only", "sft", "--from", "sft")
    assert (both.code, "give one of them" in both.err) == (2, True)
