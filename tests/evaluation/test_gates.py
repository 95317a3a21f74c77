"""Gates pass and fail as their file says, differences are told from chance, and JUnit reads the outcome."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from core_training.data.records import Record
from core_training.foundation.errors import InputError
from evaluation.figures.comparisons import compared
from evaluation.figures.examples import worst_and_best
from evaluation.figures.gates import junit, read_gates, tried
from evaluation.figures.results import Grouping, Result, result_of
from evaluation.figures.statistics import holm, mcnemar
from evaluation.items import Answers, Item, Scored, Task


def result(model: str, right: list[int]) -> Result:
    """A model that has these of a task's items right; every other item is of site b."""
    record = Record({}, Path("t.jsonl"), 1)
    items = [
        Item(str(n), record, "ab"[n % 2], choices=("x", "y"), labels=("x", "y"), gold=0) for n in range(len(right))
    ]
    scored = {str(n): Scored(str(n), (-1.0, -2.0) if one else (-2.0, -1.0), (1, 1)) for n, one in enumerate(right)}
    return result_of(
        model, Task("t", items, ("accuracy", "accuracy_per_token", "ece")), Answers(scored=scored), Grouping()
    )


OURS = result("ours", [1] * 18 + [0] * 2)
BASE = result("base", [1] * 8 + [0] * 12)


def few(right: dict[str, list[int]], least: int) -> Result:
    """A model that has these of each site's items right, of groups of fewer than `least` of which nothing is told."""
    record = Record({}, Path("t.jsonl"), 1)
    sites = [(site, one) for site, own in right.items() for one in own]
    items = [
        Item(str(n), record, site, choices=("x", "y"), labels=("x", "y"), gold=0, plain=f"Of {site}, {n}?")
        for n, (site, _) in enumerate(sites)
    ]
    scored = {str(n): Scored(str(n), (-1.0, -2.0) if one else (-2.0, -1.0), (1, 1)) for n, (_, one) in enumerate(sites)}
    return result_of("ours", Task("t", items, ("accuracy",)), Answers(scored=scored), Grouping(suppress_below=least))


def verdicts(tmp_path: Path, text: str):
    (tmp_path / "gates.yaml").write_text(text)
    return tried(read_gates(tmp_path / "gates.yaml"), [OURS, BASE], ["ours"], "base")


@pytest.mark.parametrize(
    ("condition", "passed"),
    [
        ("accuracy: '>= 0.9'", True),
        ("accuracy: '> 0.9'", False),
        ("accuracy: '<= 0.9'", True),
        ("accuracy: '>= base + 0.5'", True),
        ("accuracy: '>= base + 0.51'", False),
        ("accuracy: '>= base - 1'", True),
        ("t/accuracy: '< base'", False),
        ("accuracy.worst_site: '>= 0.9'", True),
        ("accuracy.worst_site: '>= 0.91'", False),
        ("accuracy: '>= base + 0.02, significant'", True),
        ("alpha: 0.001\naccuracy: '>= base + 0.02, significant'", False),
    ],
)
def test_a_gate_passes_where_its_condition_holds(tmp_path, condition, passed):
    (one,) = verdicts(tmp_path, condition)
    assert one.passed is passed


def test_significance_is_mcnemars_adjusted_for_the_gates_that_ask_for_it(tmp_path):
    second = "accuracy_per_token: '>= base + 0.1, significant'"
    found = verdicts(tmp_path, f"accuracy: '>= base, significant'\n{second}\n")
    p = mcnemar([True] * 18 + [False] * 2, [True] * 8 + [False] * 12)
    assert p == 2 / 2**10  # ten items are right for one of them alone
    other = compared([OURS, BASE], ["ours"], ["base"])[1].difference.p
    assert [one.p for one in found] == pytest.approx(holm([p, other]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accuracy: 0.9", r'accuracy: 0.9 is no condition; write ">= 0.6"'),
        ("accuracy: '= 0.9'", "is no condition"),
        ("acc: '> 0.9'", "acc: there is no metric 'acc'"),
        ("alpha: 2\naccuracy: '> 0.9'", "alpha: 2 must be a number between 0 and 1"),
        ("ece: '<= base, significant'", "ece has no interval to tell a difference by"),
        ("accuracy: '> 0.5, significant'", "'significant' goes with base"),
        ("alpha: 0.1", "it names no metric"),
        ("[]", "it is a mapping of metrics"),
    ],
)
def test_what_is_wrong_in_a_file_of_gates_is_named(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        verdicts(tmp_path, text)


def test_a_gate_on_what_is_not_measured_is_refused_before_anything_is_asked(tmp_path):
    (tmp_path / "gates.yaml").write_text("loss: '< 2'")
    with pytest.raises(InputError, match="loss: no task measures it; there are accuracy, ece"):
        read_gates(tmp_path / "gates.yaml").check([Task("t", OURS.items, ("accuracy", "ece"))])


def test_junit_has_a_case_for_each_gate_and_says_what_failed(tmp_path):
    found = verdicts(tmp_path, "accuracy: '>= 0.5'\nece: '<= 0.0001'\n")
    suite = ElementTree.fromstring(junit(found)).find("testsuite")
    assert suite.attrib | {"name": ""} == {"name": "", "tests": "2", "failures": "1"}
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["accuracy", "ece"]
    assert [case.find("failure") is None for case in cases] == [True, False]
    assert "must be <= 0.0001" in cases[1].find("failure").get("message")


def test_models_are_compared_over_the_items_that_both_have():
    fewer = result("fewer", [1] * 18)
    (accuracy, _, *_) = compared([fewer, BASE], ["fewer"], ["base"])
    assert (accuracy.difference.n, accuracy.difference.value) == (18, pytest.approx(10 / 18))
    assert compared([OURS], ["ours"], ["ours"]) == []


def test_a_gate_on_the_worst_group_is_tried_over_those_that_are_not_told_too(tmp_path):
    (tmp_path / "gates.yaml").write_text("accuracy.worst_site: '>= 0.5'")
    bad = {"a": [1] * 9, "b": [1] * 6, "c": [0, 0]}
    (one,) = tried(read_gates(tmp_path / "gates.yaml"), [few(bad, 3)], ["ours"], None)
    assert not one.passed
    assert "one of those that are not told" in one.words
    assert "is 0" not in one.words
    (one,) = tried(read_gates(tmp_path / "gates.yaml"), [few(bad | {"c": [1, 0]}, 3)], ["ours"], None)
    assert one.passed


def test_items_of_groups_that_are_not_told_are_no_examples():
    found = few({"a": [1, 1, 0, 1], "b": [1, 0, 1, 1, 0], "c": [0, 1]}, 3)
    _, worst, best = worst_and_best([found], 20)
    assert {one.item.site for one in (*worst, *best)} == {"b"}  # a, the smallest of the others, gives c away


def test_no_cell_of_a_confusion_table_is_hidden_alone():
    from evaluation.figures.results import _hidden_counts

    assert _hidden_counts([[9, 4], [5, 9]], 0, 3) == set()
    assert _hidden_counts([[9, 2], [5, 8]], 1, 3) >= {(0, 1), (1, 0)}
    for table in ([[9, 2], [0, 8]], [[2, 0], [0, 9]], [[20, 1, 0], [6, 9, 0], [0, 0, 7]]):
        hidden = _hidden_counts(table, max(range(len(table)), key=lambda n: sum(table[n])), 3)
        size = range(len(table))
        for known in (lambda r, c: r == c, lambda r, c: r != c):
            assert sum((r, c) in hidden for r in size for c in size if known(r, c)) != 1
        assert all((r, c) in hidden for r in size for c in size if 0 < table[r][c] < 3)
