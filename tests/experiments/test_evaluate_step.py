"""A step that evaluates: what it reads, which figures there will be, where its files lie, and gates of its own file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from core_training.foundation.errors import InputError, RunError
from experiments.carrying_out import carry_out
from experiments.digests import Digester
from experiments.pipeline import load_pipeline
from tests import tiny

TASK = {"data": "asked.jsonl", "prompt": "question", "answer": "answer", "metrics": ["exact_match"], "max_tokens": 2}
FUNCTION = "def short(answers, **columns):\n    return [-len(one) for one in answers]\n"


@pytest.fixture
def write(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A pipeline of one step, `asked`, which evaluates an untrained model on questions; its files lie beside it."""
    tiny.write_jsonl(tmp_path / "asked.jsonl", tiny.questions(5, 6))
    (tmp_path / "own.py").write_text(FUNCTION)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))

    def write(**step: Any) -> Path:
        asked = {"evaluate": str(tiny_model), "on": str(tmp_path / "task.yaml"), **step}
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / "runs"), "steps": {"asked": asked}}))
        return path

    return write


def digest(path: Path) -> str:
    return load_pipeline(path).steps[0].step.digest(Digester(path.parent / "digests.json"))


@pytest.mark.parametrize(
    "changed", [{"max_tokens": 5}, {"stop": ["."]}, {"temperature": 0.5}, {"chat": False}, {"system": "Be brief."}]
)
def test_every_key_of_a_task_counts(write: Callable[..., Path], tmp_path: Path, changed: dict[str, Any]):
    path = write()
    before = digest(path)
    assert digest(path) == before
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK | changed))
    assert digest(path) != before


def test_the_content_of_a_tasks_own_function_counts(write: Callable[..., Path], tmp_path: Path):
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK | {"metrics": ["own.py:short"]}))
    path = write()
    before = digest(path)
    (tmp_path / "own.py").write_text(FUNCTION.replace("-len", "len"))
    assert digest(path) != before


def test_the_content_of_a_modules_function_counts(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "of_a_module.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(metrics=["of_a_module:short"])
    before = digest(path)
    (tmp_path / "of_a_module.py").write_text(FUNCTION.replace("-len", "len"))
    assert digest(path) != before


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"gates": {"exact_mach": ">= 0"}}, "steps.asked.gates.exact_mach: .*did you mean 'exact_match'"),
        ({"gates": {"accuracy": ">= 0"}}, "known here: exact_match"),
        ({"on": "asked.jsonl", "gates": {"acuracy": ">= 0"}}, "gates.acuracy: acuracy: unknown key"),
        ({"on": ["task.yaml", "asked.jsonl"], "gates": {"exact_match": ">= 0"}}, "task.exact_match"),
        (
            {"on": ["task.yaml", "asked.jsonl"], "gates": {"tusk.exact_match": ">= 0"}},
            "mean 'task.exact_match'",
        ),
        (
            {"on": "${none}/answers.jsonl", "gates": {"acuracy": ">= 0"}},
            "gates.acuracy: .* did you mean accuracy",
        ),
        ({"evaluate": "no/run", "on": "held-out", "gates": {"los": "<= 1"}}, "gates.los: .* did you mean loss"),
        ({"on": ["task.yaml", "task.yaml"], "gates": {"task.exact_match": ">= 0"}}, "two tasks are called 'task'"),
        ({"on": "no.jsonl"}, "steps.asked.on: no.jsonl: no such file"),
    ],
)
def test_a_gate_on_what_no_task_measures_is_told_before_anything_runs(write, step: dict[str, Any], said: str):
    path = write(**step)
    if "${none}" in str(step):
        document = yaml.safe_load(path.read_text())
        document["steps"] = {"none": {"evaluate": "x", "on": str(path.parent / "task.yaml")}, **document["steps"]}
        path.write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(InputError, match=said):
        load_pipeline(path)


@pytest.mark.parametrize(
    "step",
    [
        {"gates": {"exact_match": ">= 0"}},
        {"on": ["task.yaml", "asked.jsonl"], "gates": {"asked.rouge_l": ">= 0"}},
        {"on": "asked.jsonl", "metrics": ["own.py:short", "regex:a.b"], "gates": {"own.py:short": "< 0"}},
        {"on": "asked.jsonl", "reward": "no/run", "gates": {"reward": "> 0"}},
        {"on": "ask*.jsonl", "gates": {"loss": "<= 9"}},
        {"evaluate": "no/run", "on": "held-out", "gates": {"loss": "<= 1"}},
    ],
)
def test_gates_on_what_tasks_measure_and_files_beside_the_pipelines(write, step: dict[str, Any]):
    load_pipeline(write(**step))


def watch(planned: Any) -> Any:
    return nullcontext(lambda *_: None)


@pytest.mark.slow
def test_gates_of_a_file_end_the_pipeline_in_their_words(write, tiny_model: Path, tmp_path: Path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    gates = tmp_path / "gates.yaml"
    gates.write_text('loss: "<= base + 0.01"\nloss.worst_sign: "<= 100"\nexact_match: ">= base, significant"\n')
    records = [{**one, "sign": "ab"[n % 2]} for n, one in enumerate(tiny.questions(5, 6))]
    tiny.write_jsonl(tmp_path / "asked.jsonl", records)
    step = {"on": "asked.jsonl", "metrics": ["loss", "exact_match"], "against": str(other), "by": "sign"}
    path = write(**step, max_tokens=2, gates_file="gates.yaml", gates={"loss": "<= 100"})
    carried = carry_out(load_pipeline(path), watch)
    failed = carried.ended_by
    assert isinstance(failed, RunError)
    name = tiny_model.name
    said = f"a gate of step 'asked' did not pass: {name}: exact_match is 0, must be >= 0 (base 0), p 1 by Holm over 1"
    assert str(failed).startswith(said)
    (outcome,) = carried.outcomes
    assert [gate.passed for gate in outcome.gates] == [True, True, True, False]
    assert outcome.document()["gates"][1]["gate"].startswith(f"{name}: loss is ")
    told = json.loads((tmp_path / "runs" / "asked" / "results.json").read_text())
    assert [one["passed"] for one in told["gates"]] == [True, True, False]
    assert set(told["results"][0]["groups"]["sign"]) == {"a", "b"}
    suite = ElementTree.parse(tmp_path / "runs" / "asked" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")

    again = carry_out(load_pipeline(path), watch)
    assert [one.passed for one in again.outcomes[0].gates] == [True, True, True, False]
    assert again.ended_by is not None
    gates.write_text('loss: "<= base + 0.01"\n')
    after = carry_out(load_pipeline(path), watch)
    assert (after.ended_by, after.outcomes[0].status, len(after.outcomes[0].gates)) == (None, "done", 2)
    assert carry_out(load_pipeline(path), watch).outcomes[0].status == "skipped"


def test_a_judges_weights_and_the_gates_file_count(write, tiny_model: Path, tmp_path: Path):
    judge = shutil.copytree(tiny_model, tmp_path / "judge")
    gates = tmp_path / "gates.yaml"
    gates.write_text('exact_match: ">= 0"\n')
    path = write(judge=str(judge), gates_file="gates.yaml")
    before = digest(path)
    gates.write_text('exact_match: ">= 0.1"\n')
    between = digest(path)
    assert between != before
    (judge / "config.json").write_text((judge / "config.json").read_text() + " ")
    assert digest(path) != between


@pytest.mark.parametrize(
    ("step", "gates", "said"),
    [
        ({"temperature": -1}, "", "steps.asked.temperature: give a number"),
        ({"suppress_below": "few"}, "", "steps.asked.suppress_below: give a whole number from 0 up"),
        ({"by": 3}, "", "steps.asked.by: a name, or a list of names"),
        ({"by": "ward"}, "", "steps.asked.by: ward: no item has anything there"),
        ({"judge": []}, "", "steps.asked.judge: name a"),
        ({"gates_file": "no.yaml"}, "", "steps.asked.gates_file: no.yaml: no such file"),
        ({"gates_file": "gates.yaml"}, "exact_match: about 1", "steps.asked.gates_file: .*is no condition"),
        ({"gates_file": "gates.yaml"}, "exact_match: '>= base'", "gates_file: a gate is held against base; .* against"),
        ({"gates_file": "gates.yaml"}, "accuracy: '>= 0'", "steps.asked.gates_file: accuracy: no task measures it"),
        ({"gates_file": "gates.yaml"}, "exact_match.worst_ward: '>= 0'", "ward: no item has anything there"),
    ],
)
def test_what_is_wrong_in_a_step_is_told_before_anything_runs(write, tmp_path: Path, step, gates: str, said: str):
    if gates:
        (tmp_path / "gates.yaml").write_text(gates)
    with pytest.raises(InputError, match=said):
        load_pipeline(write(**step))
