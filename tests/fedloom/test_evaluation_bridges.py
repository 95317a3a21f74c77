"""`fedloom evaluate --evidently DIR --promptfoo DIR`: asked before a model answers, told with the evaluation's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.bridges import evidently, promptfoo
from tests.evaluation.bridge_environments import environment
from tests.fedloom.conftest import Command


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"Where does case {number} go?", "answer": f"To ward {number % 3}."} for number in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def evaluate(fedloom: Command, tiny_model: Path, records: Path, tmp_path: Path) -> Callable[..., Any]:
    """A short evaluation of a base model; its answers are random."""

    def run(*arguments: object) -> Any:
        usual = ("--on", records, "--to", tmp_path / "to", "--max-tokens", 4, "--metrics", "exact_match,refusal")
        return fedloom("evaluate", tiny_model, *usual, *arguments)

    return run


@pytest.mark.slow
def test_evidently_tells_what_the_evaluation_tells(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    home = environment(evidently.ENVIRONMENT)
    asked = ("--evidently", tmp_path / "report", "--evidently-env", home)
    outcome = evaluate(*asked, "--evidently-test", "exact_match >= 0.9", "--evidently-test", "refusal <= 0", "--json")
    assert outcome.code == 1
    assert "1 of Evidently's named tests failed: " in outcome.err
    document = json.loads(outcome.out)
    (report,) = document["evidently"]
    metrics = document["results"][0]["metrics"]
    for name in ("exact_match", "refusal"):
        assert report["figures"][name]["share"] == metrics[name]["value"]
    assert [one["passed"] for one in report["tests"]] == [False, True]
    assert (tmp_path / "report" / "report.html").stat().st_size > 1_000_000
    assert json.loads((tmp_path / "to" / "results.json").read_text())["evidently"] == document["evidently"]


@pytest.mark.slow
def test_promptfoo_tells_what_the_evaluation_tells(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    home = environment(promptfoo.ENVIRONMENT)
    outcome = evaluate("--promptfoo", tmp_path / "suite", "--promptfoo-env", home)
    assert outcome.code == 0, outcome.err  # a test that fails is a result
    assert "promptfoo passes 0 of 6 cases (exact_match 0 of 6)" in outcome.err
    document = json.loads((tmp_path / "to" / "results.json").read_text())
    (figures,) = document["promptfoo"][0]["contestants"].values()
    assert figures["checks"]["exact_match"]["share"] == document["results"][0]["metrics"]["exact_match"]["value"]
    assert figures["failed"] == 6


@pytest.mark.slow
def test_promptfoo_asks_the_models_themselves(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    home = environment(promptfoo.ENVIRONMENT)
    outcome = evaluate("--promptfoo", tmp_path / "suite", "--promptfoo-env", home, "--promptfoo-asks")
    assert outcome.code == 0, outcome.err
    kept = [json.loads(line) for line in (tmp_path / "to" / "answers.jsonl").read_text().splitlines()]
    cases = json.loads((tmp_path / "suite" / "results.json").read_text())["results"]["results"]
    given = {case["testCase"]["description"]: case["response"]["output"] for case in cases}
    assert given == {row["id"]: row["answer"] for row in kept}  # greedy both times


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--evidently-test", "length <= 3"), "--evidently-test: name the report's folder with --evidently DIR"),
        (("--promptfoo-check", "contains"), "--promptfoo-check: name the suite's folder with --promptfoo DIR"),
        (("--promptfoo-asks",), "--promptfoo-asks: name the suite's folder with --promptfoo DIR"),
        (("--evidently", "NEW", "--evidently-test", "length"), "'length' is no test: write NAME"),
        (("--evidently", "NEW", "--evidently-test", "refusal <= base"), "needs a model to compare with"),
        (("--promptfoo", "NEW", "--promptfoo-check", "bleu"), "'bleu' is no check for promptfoo"),
        (("--evidently", "FULL"), "--evidently: FULL exists and is not empty"),
        (("--promptfoo", "NEW", "--metrics", "loss"), "questions gives no answers in words"),
        (
            ("--evidently", "NEW"),
            "Evidently needs an environment of its own, and FEDLOOM_OFFLINE=1 says to fetch nothing",
        ),
        (("--promptfoo", "NEW"), "promptfoo needs an environment of its own, and FEDLOOM_OFFLINE=1"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_answers(
    fedloom: Command,
    tiny_model: Path,
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    monkeypatch.setenv("FEDLOOM_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kind in (evidently.ENVIRONMENT, promptfoo.ENVIRONMENT):
        monkeypatch.delenv(kind.variable, raising=False)
    places = {"NEW": str(tmp_path / "new"), "FULL": str(tmp_path / "full")}
    given = [places.get(one, one) for one in arguments]
    outcome = fedloom("evaluate", tiny_model, "--on", records, "--to", tmp_path / "to", *given)
    assert outcome.code == 2
    assert said.replace("FULL", places["FULL"]) in outcome.err
    assert not (tmp_path / "to").exists()


def test_an_environment_that_is_none_is_told_by_its_option(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    outcome = evaluate("--promptfoo", tmp_path / "new", "--promptfoo-env", tmp_path / "mine")
    assert outcome.code == 2
    assert "--promptfoo-env: " in outcome.err
    assert "is no environment of promptfoo" in outcome.err


def test_environments_are_made_by_name() -> None:
    command = [sys.executable, "-m", "evaluation.bridges.environments", "evidence"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.endswith("NAME…, of evidently, promptfoo\n")
