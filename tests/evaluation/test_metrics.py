"""Metrics of choices against hand-made tables."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from core_training.data.records import Record
from core_training.foundation.errors import InputError
from evaluation.figures.metrics import chosen, confidence, confusion, metric, rubric_points, scores
from evaluation.figures.results import Grouping, hidden_cells, result_of
from evaluation.figures.statistics import Sums, difference, interval
from evaluation.items import Answers, Criterion, Item, Judged, Measured, Scored, Task, Written
from evaluation.running import Evaluation
from fedloom.evaluation_page import write_report


def item(name: str, gold: int = 0, choices: tuple[str, ...] = ("yes", "no"), **more) -> Item:
    record = Record({}, Path("items.jsonl"), 1)
    return Item(name, record, more.pop("site", "a"), choices=choices, labels=choices, gold=gold, **more)


def scored(*logps: float, tokens: tuple[int, ...] | None = None) -> Scored:
    return Scored("", logps, tokens or (1,) * len(logps))


def answers_of(**found: Scored) -> Answers:
    return Answers(scored={name: Scored(name, one.logps, one.tokens) for name, one in found.items()})


def test_length_is_taken_into_account_by_token_and_by_character():
    one = item("a", choices=("no", "perhaps so"))
    found = scored(-2.0, -3.0, tokens=(1, 3))
    assert scores(one, found) == [-2.0, -3.0]
    assert scores(one, found, "token") == [-2.0, -1.0]
    assert scores(one, found, "character") == [-1.0, -0.3]
    assert [chosen(one, found, by) for by in ("", "token", "character")] == [0, 1, 1]


def test_of_choices_that_tie_the_first_is_taken_and_it_is_told():
    items = [item("a", 0), item("b", 1)]
    answers = answers_of(a=scored(-1.0, -1.0), b=scored(-1.0, -1.0))
    assert metric("accuracy").of(items, answers)[1].value == 0.5
    assert metric("ties").of(items, answers)[1].value == 1.0


def test_the_expected_calibration_error_of_a_hand_made_table():
    # Confidence 0.8 twice, one of them right; 0.65 twice, both right: (2 · |0.8 − 0.5| + 2 · |0.65 − 1|) / 4.
    items = [item(name, gold) for name, gold in (("a", 0), ("b", 1), ("c", 0), ("d", 0))]
    sure, less = scored(math.log(0.8), math.log(0.2)), scored(math.log(0.65), math.log(0.35))
    answers = answers_of(a=sure, b=sure, c=less, d=less)
    assert confidence(sure) == pytest.approx(0.8)
    assert metric("ece").of(items, answers)[1].value == pytest.approx((2 * 0.3 + 2 * 0.35) / 4)


def test_macro_f1_and_confusion_of_a_hand_made_table():
    # Right yes, yes, yes, no; chosen yes, yes, no, no. F1 of yes: 4/5, of no: 2/3; nobody said or was maybe.
    three = ("yes", "no", "maybe")
    items = [item(name, gold, three) for name, gold in (("a", 0), ("b", 0), ("c", 0), ("d", 1))]
    yes, no = scored(-1.0, -2.0, -9.0), scored(-2.0, -1.0, -9.0)
    answers = answers_of(a=yes, b=yes, c=no, d=no)
    assert metric("macro_f1").of(items, answers)[1].value == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert confusion(items, answers) == (list(three), [[2, 1, 0], [0, 1, 0], [0, 0, 0]])


def test_beside_an_accuracy_stand_its_baselines():
    items = [item("a", 0), item("b", 0), item("c", 1), item("d", 0, ("yes", "no", "maybe", "both"))]
    answers = answers_of(**{one.id: scored(-1.0, -2.0, *(-3.0,) * (len(one.choices) - 2)) for one in items})
    found = result_of("m", Task("t", items, ("accuracy",)), answers, Grouping()).document
    assert found["metrics"]["accuracy"] | {"low": 0, "high": 0} == {
        "value": 0.75, "low": 0, "high": 0, "n": 4, "majority": 0.75, "random": (3 / 2 + 1 / 4) / 4,
    }  # fmt: skip
    assert found["baselines"]["majority"]["answer"] == "yes"


def test_loss_is_per_token_and_perplexity_its_exponential():
    items = [item("a"), item("b")]
    answers = Answers(measured={"a": Measured("a", 6.0, 2, 1), "b": Measured("b", 2.0, 6, 3)})
    assert metric("loss").of(items, answers)[1].value == 1.0
    assert metric("perplexity").of(items, answers)[1].value == pytest.approx(math.e)
    assert metric("token_accuracy").of(items, answers)[1].value == 0.5


def test_an_items_samples_count_as_one_item():
    items = [item("a", references=("x",)), item("b", references=("x",))]
    written = {("a", n): Written("a", n, "x" if n else "y", 1, True) for n in range(4)}
    written["b", 0] = Written("b", 0, "y", 1, True)
    ids, sums = metric("exact_match").of(items, Answers(written=written))
    assert (ids, sums.value, len(sums)) == (["a", "b"], 0.375, 2)


def test_rubrics_count_points_over_positive_points_and_unjudged_answers_not_at_all():
    one = item("a", rubric=(Criterion("says so", 3), Criterion("explains", 5), Criterion("invents", -4)))
    assert rubric_points(one, [True, False, False]) == pytest.approx(3 / 8)
    assert rubric_points(one, [True, True, True]) == pytest.approx(0.5)
    assert rubric_points(one, [True, None, True]) is None
    worst = item("b", rubric=(Criterion("says so", 1), Criterion("invents", -4)))
    judged = {("a", 0): Judged("a", 0, (True, None, True)), ("b", 0): Judged("b", 0, (False, True))}
    found = result_of("m", Task("t", [one, worst], ("rubric",)), Answers(judged=judged), Grouping()).document
    assert found["metrics"]["rubric"]["value"] == 0.0  # −4 is cut to 0
    assert found["unjudged"] == {"criteria": 1, "of": 5, "answers": 1}
    assert found["notes"] == [
        "the judge gave no verdict on 1 of 5 criteria: 1 of 2 answers count for nothing in rubric"
    ]


def test_groups_are_those_of_a_column_and_of_sites():
    items = [item("a", 0, site="x"), item("b", 1, site="y", columns={"qtype": "1"})]
    answers = answers_of(a=scored(-1.0, -2.0), b=scored(-1.0, -2.0))
    found = result_of("m", Task("t", items, ("accuracy",)), answers, Grouping(("qtype",))).document["groups"]
    assert {value: one["metrics"]["accuracy"]["value"] for value, one in found["site"].items()} == {"x": 1.0, "y": 0.0}
    assert {value: one["n"] for value, one in found["qtype"].items()} == {"1": 1, "(none)": 1}


def test_of_small_groups_nothing_is_told_and_one_alone_is_no_difference_from_the_total():
    from collections import Counter

    assert hidden_cells(Counter(a=2, b=7, c=9), 5) == {"a", "b"}
    assert hidden_cells(Counter(a=2, b=3, c=9), 5) == {"a", "b"}
    assert hidden_cells(Counter(a=6, b=7), 5) == set()
    items = [item(str(n), 0, site="small" if n < 2 else "large") for n in range(9)]
    answers = answers_of(**{one.id: scored(-1.0, -2.0) for one in items})
    found = result_of("m", Task("t", items, ("accuracy",)), answers, Grouping((), 5)).document
    assert found["groups"]["site"]["small"] == {"n": None, "suppressed": True, "metrics": {}}
    assert found["groups"]["site"]["large"]["n"] is None


def test_a_metric_that_is_none_is_named_with_what_was_meant():
    with pytest.raises(InputError, match="there is no metric 'acuracy'; did you mean accuracy"):
        metric("acuracy")
    with pytest.raises(InputError, match="is no regular expression"):
        metric("regex:(")


def test_a_regular_expression_is_looked_for_anywhere():
    items = [item("a"), item("b")]
    written = {("a", 0): Written("a", 0, "See the ward.", 3, True), ("b", 0): Written("b", 0, "Wards", 1, True)}
    assert metric(r"regex:\bward\b").of(items, Answers(written=written))[1].value == 0.5


def test_perplexity_per_item_is_that_of_the_mean_loss_of_an_item():
    answers = Answers(measured={"a": Measured("a", 2.0, 4, 0), "b": Measured("b", 5.0, 1, 0)})
    items = [item("a"), item("b")]
    assert metric("perplexity_per_item").of(items, answers)[1].value == pytest.approx(math.exp(3.5))
    assert metric("perplexity").of(items, answers)[1].value == pytest.approx(math.exp(7 / 5))


def test_where_no_answer_was_judged_table_and_report_say_so(tmp_path):
    one = item("a", rubric=(Criterion("says so", 3), Criterion("explains", 5)))
    answers = Answers(judged={("a", 0): Judged("a", 0, (None, None))})
    result = result_of("m", Task("t", [one], ("rubric",)), answers, Grouping())
    said = "the judge gave no verdict on 2 of 2 criteria: 1 of 1 answers count for nothing in rubric"
    assert said in result.document["notes"]
    assert said in write_report(Evaluation([result], [], tmp_path, []), []).read_text()


def test_an_ece_has_no_interval_as_resamples_do_not_give_one():
    random = np.random.default_rng(5)
    covered, values = [], []
    for _ in range(100):  # right 0.05 less often than it is sure, in every bin: that is the truth
        sure = random.uniform(0.55, 1.0, size=200)
        right = random.random(200) < sure - 0.05
        items = [item(str(n), gold=0 if one else 1) for n, one in enumerate(right)]
        found = {str(n): Scored(str(n), (math.log(p), math.log(1 - p)), (1, 1)) for n, p in enumerate(sure.tolist())}
        sums = metric("ece").of(items, Answers(scored=found))[1]
        told = interval(Sums(sums.values, sums.of), resamples=200)
        covered.append(told.low <= 0.05 <= told.high)
        values.append(sums.value)
        assert math.isnan(interval(sums).low)
        assert math.isnan(difference(sums, sums).p)
    assert np.mean(values) > 0.06
    assert np.mean(covered) < 0.9
