"""Evidently's report on answers: asked as a person meant it, run for real where it is, read back to the same figures.

What is read back is held against figures computed otherwise, on a real run's files that are kept here, and on a run.
`make evidently` makes the environment and runs all of it; BRIDGES_RECORD=1 then keeps what it wrote.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest

from core_training.foundation.errors import InputError, RunError
from evaluation.bridges import evidently
from evaluation.bridges.answer_rows import AnswerRow
from evaluation.bridges.evidently_results import EvidentlyResults, read_results
from evaluation.bridges.foreign_programs import fence
from evaluation.bridges.named_tests import parse_test
from evaluation.figures.words import refuses
from tests.evaluation.bridge_environments import RECORD, RECORDED, environment
from tests.evaluation.bridge_rows import (
    CANDIDATE,
    REFERENCE,
    exact,
    jensen_shannon,
    lengths,
    matching,
    wasserstein,
)

FILES = ("report.json", "outcome.json")
PATTERN = r"\bis\b.*\.$"
TESTS = {
    "exact_match >= reference + 0.5": True,  # 8 of 12 against none
    "exact_match >= 0.7": False,
    "refusal < base": True,
    "length.max <= 40": False,
    "words >= 2": True,
    "length <= reference": True,
    "drift.length <= 0.01": False,
    f"regex:{PATTERN} > 0.1": True,
    "drift.exact_match < 1": True,
}


def named() -> list[evidently.NamedTest]:
    return [parse_test(text) for text in TESTS]


def check(results: EvidentlyResults) -> None:
    """Evidently's figures are those that one computes otherwise."""
    ours, theirs = lengths(CANDIDATE), lengths(REFERENCE)
    assert results.n == len(CANDIDATE)
    assert results.figures["length"] == pytest.approx(
        {
            "min": min(ours),
            "max": max(ours),
            "mean": fmean(ours),
            "std": stdev(ours),
            "drift": wasserstein(ours, theirs),
        }
    )
    refusals = [[bool(refuses(row.answer)) for row in rows] for rows in (CANDIDATE, REFERENCE)]
    for name, (one, other) in {
        "exact_match": (exact(CANDIDATE), exact(REFERENCE)),
        "refusal": refusals,
        f"regex:{PATTERN}": (matching(CANDIDATE, PATTERN), matching(REFERENCE, PATTERN)),
    }.items():
        assert results.figures[name] == pytest.approx({"share": fmean(one), "drift": jensen_shannon(one, other)}), name
    assert {one.test.name: one.passed for one in results.tests} == {
        test.name: passed for test, passed in zip(named(), TESTS.values(), strict=True)
    }
    assert results.tests[0].threshold == fmean(exact(REFERENCE)) + 0.5
    assert not results.passed
    assert results.versions == {"evidently": "0.7.23", "pandas": "3.0.6"}


def test_what_a_real_run_wrote_is_read_back() -> None:
    check(read_results(RECORDED / "evidently", named(), offline=True))


@pytest.fixture(scope="module")
def home() -> Path:
    return environment(evidently.ENVIRONMENT)


@pytest.fixture(scope="module")
def report(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvidentlyResults, Path]:
    folder = tmp_path_factory.mktemp("evidently") / "report"
    return evidently.write_report(folder, CANDIDATE, REFERENCE, named(), environment=home), folder


@pytest.mark.slow
def test_a_real_run_gives_the_figures_computed_otherwise(report: tuple[EvidentlyResults, Path]) -> None:
    results, folder = report
    check(results)
    assert results.offline == bool(fence())
    if os.environ.get(RECORD):
        for name in FILES:
            text = json.dumps(json.loads((folder / name).read_text()), separators=(",", ":"))
            (RECORDED / "evidently" / name).write_text(text + "\n")


@pytest.mark.slow
def test_only_named_tests_are_carried_out(report: tuple[EvidentlyResults, Path]) -> None:
    assert len(json.loads((report[1] / "report.json").read_text())["tests"]) == len(TESTS)


@pytest.mark.slow
def test_the_page_loads_nothing_from_elsewhere(report: tuple[EvidentlyResults, Path]) -> None:
    page = (report[1] / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]*", page)
    assert json.loads((report[1] / "figures.json").read_text()) == report[0].document()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [CANDIDATE[:1], [replace(row, answer="the same") for row in CANDIDATE]])
def test_figures_that_do_not_apply_are_not_told(home: Path, tmp_path: Path, rows: Sequence[AnswerRow]) -> None:
    results = evidently.write_report(
        tmp_path / "report", rows, rows, [parse_test("drift.length <= 0")], environment=home
    )
    assert results.passed
    assert results.figures["length"]["mean"] == fmean(lengths(rows))
    assert results.figures["length"].get("std", 0.0) == 0.0


@pytest.mark.slow
def test_one_model_alone_and_answers_without_expectations(home: Path, tmp_path: Path) -> None:
    rows = [replace(row, expected=None) for row in CANDIDATE]
    results = evidently.write_report(tmp_path / "report", rows, None, (), ["^I"], environment=home)
    assert set(results.figures) == {"length", "words", "refusal", "regex:^I"}
    assert results.notes == ("no exact_match: 12 of 12 answers have nothing that was expected",)
    assert results.passed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lenght >= 3", "'lenght': Evidently is asked for length, words, exact_match, refusal and regex:PATTERN"),
        ("exact_match.max >= 3", "'exact_match.max': Evidently is asked for"),
        ("length.p90 >= 3", "length.p90"),
        ("regex:( >= 0.5", r"regex:\(.*is no regular expression"),
        ("drift.length <= base", "drift is a distance from the reference already"),
        ("exact_match >= base", "needs a model to compare with; name one with --against"),
        ("drift.length <= 0.1", "needs a model to compare with"),
    ],
)
def test_a_test_that_cannot_be_asked_is_told_before_anything_runs(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        evidently.write_report(tmp_path / "report", CANDIDATE, None, [parse_test(text)])


def test_exact_match_needs_what_was_expected(tmp_path: Path) -> None:
    rows = [replace(CANDIDATE[0], expected=None), *CANDIDATE[1:]]
    with pytest.raises(InputError, match="asks for exact_match, and 1 answers have nothing that was expected"):
        evidently.write_report(tmp_path / "report", rows, None, [parse_test("exact_match >= 0.5")])


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(InputError, match=r"--evidently: .* exists and is not empty"):
        evidently.write_report(tmp_path, CANDIDATE, REFERENCE)


def test_an_environment_without_evidently_is_told(tmp_path: Path) -> None:
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(RunError, match=r"Evidently ended with code 1 and said: .*No module named 'evidently'"):
        evidently.write_report(tmp_path / "report", CANDIDATE, REFERENCE, environment=tmp_path / "env")
    assert not (tmp_path / "report").exists()


def test_questions_that_one_side_lacks_are_told() -> None:
    request, notes = evidently._request(CANDIDATE[2:], REFERENCE[:11], (), ())
    assert notes == ("1 answers have none of the reference beside them, and 2 the reverse",)
    assert [row["id"] for row in request["candidate"]] == [row.id for row in CANDIDATE[2:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda report: report["tests"].pop(), "carried out 8 tests where 9 were named"),
        (lambda report: report["tests"].reverse(), "where 'exact_match >= reference [+] 0.5' was named"),
        (lambda report: report["metrics"][0].pop("config"), "no report of the Evidently that fedloom knows"),
    ],
)
def test_a_report_of_something_else_is_refused(tmp_path: Path, change: object, words: str) -> None:
    for name in FILES:
        shutil.copy(RECORDED / "evidently" / name, tmp_path)
    document = json.loads((tmp_path / "report.json").read_text())
    change(document)  # type: ignore[operator]
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match=words):
        read_results(tmp_path, named(), offline=True)


def test_a_report_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Evidently wrote no report that can be read"):
        read_results(tmp_path, named(), offline=True)
