"""promptfoo's suite: written so that texts stay texts, run for real, read back to figures computed otherwise.

`make promptfoo` makes the environment and runs all of it; BRIDGES_RECORD=1 then keeps what promptfoo wrote.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
import yaml

from core_training.foundation.errors import InputError, RunError
from evaluation.bridges import promptfoo
from evaluation.bridges.answer_rows import AnswerRow
from evaluation.bridges.foreign_programs import fence
from evaluation.bridges.own_environments import PINS
from evaluation.bridges.promptfoo_results import PromptfooResults, read_results
from evaluation.bridges.promptfoo_suite import Check, Contestant, parse_check, suite_of
from tests.evaluation.bridge_environments import RECORD, RECORDED, environment
from tests.evaluation.bridge_rows import CANDIDATE, REFERENCE, exact, matching

FILES = ("results.json", "results.junit.xml")
PATTERN = r"\bis\b.*\.$"
OWN = """
def brevity(completions, expected, **others):
    return [len(e) / max(1, len(c)) for c, e in zip(completions, expected)]
"""
# An answer that promptfoo could take for a file, and one that is not there.
ROWS = [*CANDIDATE, AnswerRow("q12", 0, "file:///etc/hostname", "file:///etc/hostname", "hostname", "candidate", "t")]
CONTESTANTS = [Contestant("candidate", ROWS), Contestant("reference", REFERENCE)]


def checks(folder: Path) -> list[Check]:
    own = folder / "own.py"
    own.write_text(OWN)
    words = ("contains", "exact_match", "rouge_1 >= 0.9", f"regex:{PATTERN}", f"{own}:brevity >= 0.8")
    return [parse_check(text) for text in words]


def contains(rows: Sequence[AnswerRow]) -> list[bool]:
    return [str(row.expected).lower() in row.answer.lower() for row in rows]


# Of a period, the last of a text alone is a token; `cannot` is two.
_TOKEN = re.compile(r"can(?=not\b)|[\w/]+(?:\.(?=\s*\S))?|[^\w\s]")


def rouge_1(row: AnswerRow) -> float:
    """F of the tokens that answer and expectation share: those of the Penn Treebank, which promptfoo counts."""
    ours, theirs = (Counter(_TOKEN.findall(str(text))) for text in (row.answer, row.expected))
    return 2 * sum((ours & theirs).values()) / (sum(ours.values()) + sum(theirs.values()))


def check(results: PromptfooResults) -> None:
    """promptfoo's figures are those that one computes otherwise."""
    assert results.asked == 2 * len(ROWS)
    assert results.contestants["reference"].errors == 1  # which was never asked the last question
    assert results.contestants["reference"].first_error == "reference gave no answer"
    for name, rows in (("candidate", ROWS), ("reference", REFERENCE)):
        found = results.contestants[name].document()
        by_check = {key.rpartition("/")[2]: figures for key, figures in found["checks"].items()}
        expected = {
            "contains": contains(rows),
            "exact_match": exact(rows),
            f"regex:{PATTERN}": matching(rows, PATTERN),
            "own.py:brevity": [len(str(row.expected)) / len(row.answer) >= 0.8 for row in rows],
            "rouge_1": [rouge_1(row) >= 0.9 for row in rows],
        }
        assert {key: figures["share"] for key, figures in by_check.items()} == pytest.approx(
            {key: fmean(passed) for key, passed in expected.items()}
        )
        assert by_check["own.py:brevity"]["score"] == pytest.approx(
            fmean(len(str(row.expected)) / len(row.answer) for row in rows)
        )
        assert by_check["rouge_1"]["score"] == pytest.approx(fmean(map(rouge_1, rows)))
        assert found["passed"] == sum(map(all, zip(*expected.values(), strict=True)))
        assert found["failed"] == len(rows) - found["passed"]
    assert not results.passed


def test_what_a_real_run_wrote_is_read_back() -> None:
    check(read_results(RECORDED / "promptfoo", offline=True, left_out={}))


@pytest.fixture(scope="module")
def home() -> Path:
    return environment(promptfoo.ENVIRONMENT)


@pytest.fixture(scope="module")
def report(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PromptfooResults, Path]:
    folder = tmp_path_factory.mktemp("promptfoo")
    return promptfoo.write_report(folder / "report", CONTESTANTS, ROWS, checks(folder), home), folder / "report"


@pytest.mark.slow
def test_a_real_run_gives_the_figures_computed_otherwise(report: tuple[PromptfooResults, Path]) -> None:
    results, folder = report
    check(results)
    assert results.offline == bool(fence())
    assert json.loads((folder / "figures.json").read_text()) == results.document()
    if os.environ.get(RECORD):
        _record(folder)


def _record(folder: Path) -> None:
    """Keep what is read of a run's files, without what is the machine's own."""
    document = json.loads((folder / "results.json").read_text())
    results = document["results"]
    cases = [{key: case[key] for key in ("provider", "success", "error") if key in case} for case in results["results"]]
    for case, whole in zip(cases, results["results"], strict=True):
        if graded := whole.get("gradingResult"):
            case["gradingResult"] = {"componentResults": graded["componentResults"]}
    slim = {"results": {"version": results["version"], "stats": results["stats"], "results": cases}}
    text = json.dumps(slim, separators=(",", ":")).replace(f"{folder.parent}/", "")
    (RECORDED / "promptfoo" / "results.json").write_text(text + "\n")
    shutil.copy(folder / "results.junit.xml", RECORDED / "promptfoo")


@pytest.mark.slow
def test_texts_stay_as_they_are(report: tuple[PromptfooResults, Path]) -> None:
    cases = json.loads((report[1] / "results.json").read_text())["results"]["results"]
    given = {case["testIdx"]: case["response"]["output"] for case in cases if case["provider"]["label"] == "candidate"}
    assert given == {number: row.answer for number, row in enumerate(ROWS)}


@pytest.mark.slow
def test_all_that_passes_is_a_pass(home: Path, tmp_path: Path) -> None:
    rows = [replace(row, answer=str(row.expected)) for row in CANDIDATE[:2]]
    results = promptfoo.write_report(tmp_path / "r", [Contestant("m", rows)], rows, [Check("exact_match")], home)
    assert results.passed
    assert results.contestants["m"].document()["checks"] == {"exact_match": {"n": 2, "share": 1.0, "score": 1.0}}


@pytest.mark.slow
def test_a_model_in_process_answers_as_it_does_in_chat(
    home: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from core_training.models.conversation import Conversation, Sampling
    from evaluation.answers.subjects import load_subject

    run = request.getfixturevalue("run")  # trained where there is somebody to ask it, and not before
    rows = [
        AnswerRow(f"q{number}", 0, f"What is the {organ}?", "", "It") for number, organ in enumerate(("liver", "lung"))
    ]
    asked = Contestant(str(run), is_asked=True, max_tokens=6)
    promptfoo.write_report(tmp_path / "report", [asked], rows, [Check("contains")], home)
    cases = json.loads((tmp_path / "report" / "results.json").read_text())["results"]["results"]
    base = load_subject(str(run)).base
    assert {case["testIdx"]: case["response"]["output"] for case in cases} == {
        number: Conversation(base, Sampling(6)).reply(row.prompt).text for number, row in enumerate(rows)
    }


def test_no_text_of_a_record_stands_where_promptfoo_reads_templates_or_files(tmp_path: Path) -> None:
    suite = suite_of(CONTESTANTS, ROWS, checks(tmp_path))
    configuration = yaml.safe_load(suite.files["promptfooconfig.yaml"])
    assert configuration["prompts"] == [{"raw": "the question of the case", "label": "question"}]
    assert [test["vars"] for test in configuration["tests"]] == [{"case": f"case-{n}"} for n in range(len(ROWS))]
    assert promptfoo._SETTINGS["PROMPTFOO_DISABLE_TEMPLATING"] == "1"
    files = [one["value"] for test in configuration["tests"] for one in test["assert"] if "file:" in one["value"]]
    assert set(files) == {"file://check.py"}
    assert {one["id"] for one in configuration["providers"]} == {"file://provider.py"}


def test_what_was_expected_is_never_a_file(tmp_path: Path) -> None:
    rows = [*ROWS, replace(ROWS[0], id="x", expected="file:///etc/passwd"), replace(ROWS[0], id="y", expected=None)]
    suite = suite_of([Contestant("m", rows)], rows, [Check("contains")])
    assert suite.cases == len(ROWS)
    assert suite.left_out == {"promptfoo would load what was expected as a file": 1, "nothing was expected": 1}
    assert suite_of([Contestant("m", rows)], rows, [Check("regex:a")]).cases == len(ROWS) + 1  # which needs none


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("contains", Check("contains")),
        ("rouge_1", Check("rouge_1", 0.5)),
        ("rouge_1>=.3", Check("rouge_1", 0.3)),
        ("regex:^a >= 3$", Check("regex:^a >= 3$")),
        ("my/file.py:own >= 2", Check("my/file.py:own", 2.0)),
    ],
)
def test_checks_are_read(text: str, check: Check) -> None:
    assert parse_check(text) == check


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bleu", "'bleu' is no check for promptfoo: there are contains, exact_match, rouge_1, regex:PATTERN and FILE"),
        ("exact_match >= 0.5", "exact_match is met or not; leave the threshold out"),
        ("regex:(", r"'regex:\(': it is no regular expression"),
    ],
)
def test_what_is_no_check_is_told(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_check(text)


def test_what_cannot_be_asked_is_told(tmp_path: Path) -> None:
    missing = Check(f"{tmp_path / 'none.py'}:own")
    for contestants, rows, wanted, words in (
        (CONTESTANTS, ROWS, [], "nothing to check"),
        (CONTESTANTS, ROWS, [missing], "there is no file .*none.py; name one, as FILE.py:name"),
        ([CONTESTANTS[0]] * 2, ROWS, [Check("contains")], "two models are called candidate"),
        (CONTESTANTS, [replace(ROWS[0], expected="")], [Check("contains")], "of 1 questions nothing was expected"),
    ):
        with pytest.raises(InputError, match=words):
            suite_of(contestants, rows, wanted)


def loaded(name: str, folder: Path) -> ModuleType:
    """A file of the suite, as promptfoo's Python loads it, in a folder with cases."""
    shutil.copy(PINS / name, folder)
    case = {"case": "case-0", "prompt": "What?", "expected": "this", "answers": {"m": "This."}}
    (folder / "cases.jsonl").write_text(json.dumps(case) + "\n")
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), folder / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_provider_gives_kept_answers_and_tells_which_are_not_there(tmp_path: Path) -> None:
    provider, context = loaded("promptfoo_provider.py", tmp_path), {"vars": {"case": "case-0"}}
    assert provider.call_api("", {"config": {"answers": "m"}}, context) == {"output": "This."}
    assert provider.call_api("", {"config": {"answers": "n"}}, context) == {"error": "n gave no answer"}


@pytest.mark.parametrize(
    "code",
    [
        "def own(prompts, completions, expected):\n    return [len(prompts[0] + completions[0] + expected[0])]",
        "def own(asked, given, *, expected):\n    return [len(asked[0]) + len(given[0]) + len(expected[0])]",
        "def own(completions, **more):\n    return [5 + len(completions[0]) + len(more['expected'][0])]",
        "def own(completions):\n    return [14.0]",
    ],
)
def test_an_own_function_is_called_as_evaluations_call_it(tmp_path: Path, code: str) -> None:
    from evaluation.answers.judging import load_own, own_values
    from evaluation.items import Written
    from tests.evaluation.bridge_rows import item

    (tmp_path / "own.py").write_text(code)
    config = {"file": str(tmp_path / "own.py"), "function": "own", "threshold": 15}
    context = {"vars": {"case": "case-0"}, "config": config}
    found = loaded("promptfoo_check.py", tmp_path).get_assert("This.", context)
    assert found == {"pass": False, "score": 14.0, "reason": "own gave 14"}
    asked = item("a", "What?", "this")
    values = own_values(load_own(f"{tmp_path / 'own.py'}:own"), {"a": asked}, [Written("a", 0, "This.", 1, True)])
    assert values == [14.0]


def _drop_case(document: dict[str, Any]) -> None:
    document["results"]["results"].pop()


def _miscount(document: dict[str, Any]) -> None:
    document["results"]["stats"]["successes"] += 1


def _rename(document: dict[str, Any]) -> None:
    document["results"]["results"][0]["grading"] = document["results"]["results"][0].pop("provider")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop_case, "promptfoo counts passed, failed, errors as"),
        (_miscount, "promptfoo counts passed, failed, errors as"),
        (_rename, "these are no results of the promptfoo that fedloom knows"),
    ],
)
def test_results_that_disagree_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    for name in FILES:
        shutil.copy(RECORDED / "promptfoo" / name, tmp_path)
    document = json.loads((tmp_path / "results.json").read_text())
    change(document)
    (tmp_path / "results.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match=words):
        read_results(tmp_path, offline=True, left_out={})


@pytest.mark.parametrize(
    ("junit", "words"),
    [
        ("<testsuites><testcase/></testsuites>", "its JUnit as"),
        ("<testsuites>", "these are no results of the promptfoo"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "it declares entities"),
    ],
)
def test_junit_that_disagrees_is_refused(tmp_path: Path, junit: str, words: str) -> None:
    shutil.copy(RECORDED / "promptfoo" / "results.json", tmp_path)
    (tmp_path / "results.junit.xml").write_text(junit)
    with pytest.raises(RunError, match=words):
        read_results(tmp_path, offline=True, left_out={})


@pytest.mark.parametrize(
    ("system", "machine", "libc", "package"),
    [
        ("Linux", "x86_64", "glibc", "@libsql/linux-x64-gnu"),
        ("Linux", "aarch64", "", "@libsql/linux-arm64-musl"),
        ("Darwin", "arm64", "", "@libsql/darwin-arm64"),
    ],
)
def test_the_database_of_this_machine_is_pinned(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, libc: str, package: str
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.libc_ver", lambda: (libc, ""))
    assert promptfoo._binding() == package
    packages = json.loads((PINS / "promptfoo-lock.json").read_text())["packages"]
    assert packages[f"node_modules/{package}"]["version"] == packages["node_modules/libsql"]["version"]
    assert all("resolved" not in one for one in packages.values())  # people's own settings say from where
    monkeypatch.setattr("platform.machine", lambda: "sparc")
    with pytest.raises(InputError, match=r"no build for .* on sparc"):
        promptfoo._binding()


def test_an_environment_without_node_is_told(tmp_path: Path) -> None:
    entry = tmp_path / promptfoo.ENVIRONMENT.program
    entry.parent.mkdir(parents=True)
    entry.write_text("")
    with pytest.raises(InputError, match=r"--promptfoo-env: .* has no Node"):
        promptfoo.write_report(tmp_path / "report", CONTESTANTS, ROWS, [Check("contains")], tmp_path)
    assert not (tmp_path / "report").exists()
