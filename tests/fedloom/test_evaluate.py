"""`fedloom evaluate`: as a person types it, on runs, exported folders and base models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.data.formats import read_values
from core_training.data.records import records_in
from core_training.engine.tokenising import is_held_out
from core_training.recipe.reading import load_recipe
from tests import tiny
from tests.evaluation.conftest import pubmedqa
from tests.fedloom.conftest import Command


@pytest.fixture(scope="module")
def run(finished_run: Callable[..., Path]) -> Path:
    return finished_run()


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "pubmedqa.json"
    path.write_text(json.dumps(pubmedqa(12)))
    return path


def results(out: str) -> list[dict]:
    return json.loads(out)["results"]


def test_a_run_and_a_base_model_on_questions(fedloom: Command, run: Path, tiny_model: Path, questions: Path) -> None:
    outcome = fedloom("evaluate", run, tiny_model, "--on", questions, "--by", "YEAR", "--json")
    assert outcome.code == 0, outcome.err
    first, second = results(outcome.out)
    assert (first["model"], second["model"], first["task"], first["n"]) == (str(run), str(tiny_model), "pubmedqa", 12)
    accuracy = first["metrics"]["accuracy"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert {group["n"] for group in first["groups"]["YEAR"].values()} == {6}
    folder = run.parent / "evaluations" / "run-pubmedqa"
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert {"id", "prompt", "answer", "expected"} <= rows[0].keys()
    right = sum(row["answer"] == row["expected"] for row in rows if row["model"] == str(run))
    assert right / 12 == accuracy["value"]
    assert json.loads((folder / "results.json").read_text())["results"] == [first, second]
    page = (folder / "report.html").read_text()
    assert page.count("<img") >= 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    shutil.rmtree(folder.parent)


def test_the_held_out_records_of_a_run_give_its_own_loss_at_every_site(
    fedloom: Command, run: Path, tmp_path: Path
) -> None:
    outcome = fedloom("evaluate", run, "--on", "held-out", "--metrics", "loss", "--to", tmp_path / "to", "--json")
    (found,) = results(outcome.out)
    summary = json.loads((run / "summary.json").read_text())
    assert found["metrics"]["loss"]["value"] == pytest.approx(summary["eval_loss"], abs=1e-6)
    for name, site in summary["sites"].items():
        if name in found["groups"].get("site", {}):
            own = found["groups"]["site"][name]["metrics"]["loss"]["value"]
            assert own == pytest.approx(site["eval_loss"], abs=1e-6)
    assert found["overlap"]["items"] == 0


def test_items_that_were_trained_on_are_told(fedloom: Command, run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    trained = []
    for record in records_in(recipe.data.train):
        values = read_values(record, "sft", recipe.data.columns)
        if not is_held_out(values.identity, recipe.data.eval_fraction):
            trained.append(record.fields)
    others = [{"question": f"Something else entirely, number {n}, here?", "answer": "No."} for n in range(3)]
    file = tiny.write_jsonl(tmp_path / "mixed.jsonl", trained[:4] + others)
    outcome = fedloom("evaluate", run, "--on", file, "--metrics", "loss", "--to", tmp_path / "to", "--json")
    (found,) = results(outcome.out)
    assert (found["overlap"]["items"], found["overlap"]["records"]) == (4, len(trained))
    assert "the questions of 4 of 7 items stand in the records" in found["notes"][0]
    assert (
        "overlap"
        not in results(
            fedloom(
                "evaluate", run, "--on", file, "--metrics", "loss", "--to", tmp_path / "to", "--json", "--no-overlap"
            ).out
        )[0]
    )


def test_an_exported_adapter_and_a_merged_model_are_the_run(
    fedloom: Command, run: Path, questions: Path, tmp_path: Path
) -> None:
    fedloom("export", run, "--to", tmp_path / "adapter")
    fedloom("export", run, "--merge", "--to", tmp_path / "merged")
    outcome = fedloom(
        "evaluate", run, tmp_path / "adapter", tmp_path / "merged", "--on", questions, "--to", tmp_path / "to", "--json"
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "to" / "answers.jsonl").read_text().splitlines()]
    by_model = {row["model"]: {} for row in rows}
    for row in rows:
        by_model[row["model"]][row["id"]] = row["logps"]
    first, *others = by_model.values()
    for other in others:
        assert all(other[name] == pytest.approx(first[name], abs=1e-4) for name in first)


def test_failed_gates_end_with_1_and_passed_ones_with_0(
    fedloom: Command, run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    gates = tmp_path / "gates.yaml"
    command = (
        *("evaluate", run, "--on", "held-out", "--against", tiny_model, "--metrics", "loss", "--to", tmp_path / "to"),
        *("--gates", gates, "--junit", tmp_path / "gates.xml"),
    )
    gates.write_text("loss: '<= base - 0.001'\nloss.worst_site: '<= 100'\n")
    passed = fedloom(*command, "--json")
    assert passed.code == 0, passed.err
    document = json.loads(passed.out)
    assert [one["passed"] for one in document["gates"]] == [True, True]
    assert document["comparisons"][0]["difference"] < 0
    gates.write_text("loss: '<= base - 100'\n")
    failed = fedloom(*command)
    assert failed.code == 1
    assert "error: 1 of 1 gates failed" in failed.err
    assert 'failures="1"' in (tmp_path / "gates.xml").read_text()


def test_answers_are_written_once_and_told_in_a_table(fedloom: Command, run: Path, tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "q.jsonl", tiny.questions(7, 4))
    command = ("evaluate", run, "--on", file, "--max-tokens", 5, "--to", tmp_path / "to")
    first = fedloom(*command)
    assert first.code == 0, first.err
    assert "token_f1" in first.out
    assert "answers: item 4/4" in first.err
    again = fedloom(*command)
    assert again.out == first.out
    assert "answers: item" not in again.err


def test_samples_are_drawn_at_a_temperature(fedloom: Command, run: Path, tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "q.jsonl", tiny.questions(7, 3))
    command = ("evaluate", run, "--on", file, "--metrics", "ended,answer_tokens", "--max-tokens", 5, "--samples", 2)
    refused = fedloom(*command)
    assert (refused.code, "at temperature 0 all are the same" in refused.err) == (2, True)
    outcome = fedloom(*command, "--temperature", 1.5, "--to", tmp_path / "to", "--json")
    assert results(outcome.out)[0]["metrics"]["ended"]["n"] == 3
    assert len((tmp_path / "to" / "answers.jsonl").read_text().splitlines()) == 6


def test_a_model_without_a_chat_template_answers_texts_and_no_conversations(
    fedloom: Command, tiny_model: Path, questions: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    outcome = fedloom("evaluate", bare, "--on", questions, "--to", tmp_path / "to", "--json")
    assert outcome.code == 0, outcome.err
    file = tiny.write_jsonl(tmp_path / "q.jsonl", tiny.questions(7, 3))
    outcome = fedloom("evaluate", bare, "--on", file, "--max-tokens", 4, "--to", tmp_path / "to2", "--json")
    assert outcome.code == 0, outcome.err
    assert results(outcome.out)[0]["metrics"]["loss"]["n"] == 3
    turns = [{"role": role, "content": "Hm?"} for role in ("user", "assistant") * 2]
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    refused = fedloom("evaluate", bare, "--on", chat, "--to", tmp_path / "to3")
    assert refused.code == 2
    assert "line 1: it is a conversation" in refused.err
    assert "has no chat template" in refused.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--on", "none.jsonl"), "'none.jsonl' matches no file"),
        (("--on", "QUESTIONS", "--by", "WARD"), "--by WARD: no item has anything there; there are site"),
        (("--on", "QUESTIONS", "--metrics", "acuracy"), "there is no metric 'acuracy'; did you mean accuracy?"),
        (("--on", "QUESTIONS", "--junit", "x.xml"), "--junit: it is the outcome of gates"),
        (("--on", "QUESTIONS", "--on", "QUESTIONS"), "two tasks are called 'pubmedqa'"),
        (("--on", "held-out"), "none of the models is a run"),
    ],
)
def test_wrong_input_is_told_in_a_line(
    fedloom: Command, tiny_model: Path, questions: Path, arguments: tuple[str, ...], said: str
) -> None:
    given = [str(questions) if one == "QUESTIONS" else one for one in arguments]
    outcome = fedloom("evaluate", tiny_model, *given)
    assert outcome.code == 2
    assert said in outcome.err


def test_a_model_that_is_nowhere_is_told(fedloom: Command, questions: Path, tmp_path: Path) -> None:
    outcome = fedloom("evaluate", tmp_path / "nothing", "--on", questions, "--to", tmp_path / "to")
    assert outcome.code == 2
    assert "no run folder, model folder or exported adapter" in outcome.err


def test_reading_tasks_and_gates_loads_no_torch(environment: dict[str, str]) -> None:
    program = (
        "import sys, evaluation.tasks.loading, evaluation.figures.gates, evaluation.figures.results;"
        "import fedloom.commands.evaluate;"
        "print([name for name in ('torch', 'transformers', 'flwr') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
    program = "import sys, fedloom.commands.evaluate; print('numpy' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_a_pattern_among_metrics_has_commas_of_its_own() -> None:
    from fedloom.commands.evaluate import _metrics

    assert _metrics(["loss, accuracy", "ece,regex:a{1,2}"]) == ("loss", "accuracy", "ece", "regex:a{1,2}")


def test_models_of_one_name_have_folders_and_columns_of_their_own(
    fedloom: Command, tiny_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "y"):
        shutil.copytree(tiny_model, Path(folder, "copy"))
        assert fedloom("evaluate", f"{folder}/copy", "--on", questions, "--metrics", "accuracy").code == 0
    assert len([path.read_text() for path in Path("evaluations").glob("copy-*-pubmedqa/results.json")]) == 2
    both = ("x/copy", "--against", "y/copy", "--metrics", "accuracy", "--to", "to")
    outcome = fedloom("evaluate", *both, "--on", questions)
    assert "x/copy − y/copy" in outcome.out
    assert "x/copy − y/copy" in Path("to/report.html").read_text()
    assert {"x/copy", "y/copy"} <= set(outcome.out.split())
