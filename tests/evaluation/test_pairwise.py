"""Looks at pairs into outcomes: both orders, several judges, what sways them; and how far people agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.data.records import Record
from evaluation.items import Item
from evaluation.pairs.agreement import agreement, cohen, fleiss
from evaluation.pairs.pair_judges import FunctionJudge, judge_name, takes_pairs, winner_in
from evaluation.pairs.pairwise import (
    Look,
    Outcome,
    Shown,
    Winner,
    counts,
    outcome,
    pair_document,
    position_bias,
    winners_length,
    wins_by_item,
)
from evaluation.pairs.people.assignment import shown_to
from evaluation.pairs.verdicts import KeptLooks, preferences
from evaluation.tasks.formats import Reading, items_of

FIRST, SECOND, TIE = Winner.FIRST, Winner.SECOND, Winner.TIE


def shown(first: str = "A", second: str = "B", item: str = "1", texts: tuple[str, str] = ("yes", "no")) -> Shown:
    prompt = [{"role": "user", "content": f"Question {item}?"}]
    record = Record({"ward": "heart", "prompt": f"Question {item}?"}, Path("prompts.jsonl"), 1)
    return Shown(Item(item, record, "", prompt=prompt, plain=f"Question {item}?"), first, second, texts)


def look(winner: Winner | None, first: str = "A", second: str = "B", by: str = "judge", margin: float | None = None):
    return Look("1", first, second, by, winner, margin)


@pytest.mark.parametrize(
    ("in_order", "turned", "share"),
    [
        (FIRST, SECOND, 1.0),
        (SECOND, FIRST, 0.0),
        (FIRST, FIRST, 0.5),
        (SECOND, SECOND, 0.5),
        (TIE, TIE, 0.5),
        (FIRST, TIE, 0.5),
        (FIRST, None, None),
        (None, None, None),
    ],
)
@pytest.mark.parametrize(("ours", "theirs"), [("A", "B"), ("B", "A")])
def test_both_orders_must_agree_or_it_is_a_tie(in_order, turned, share, ours, theirs):
    looks = [look(in_order, ours, theirs), look(turned, theirs, ours)]
    assert outcome(shown(ours, theirs), looks, orders=2).share == share


def test_a_judge_that_saw_one_order_alone_has_not_judged():
    assert outcome(shown(), [look(FIRST)], orders=2).share is None
    assert outcome(shown(), [look(FIRST)], orders=1).share == 1.0


def test_of_several_people_the_majority_decides_and_the_margin_is_its_lead():
    looks = [look(FIRST, by="ann"), look(SECOND, "B", "A", by="bob"), look(SECOND, by="cem")]
    found = outcome(shown(), looks, orders=1)
    assert (found.share, found.margin) == (1.0, pytest.approx(1 / 3))
    assert outcome(shown(), looks[1:], orders=1).share == 0.5


def test_the_margin_of_scores_is_their_difference():
    looks = [look(FIRST, margin=2.5), look(SECOND, "B", "A", margin=2.5)]
    assert outcome(shown(), looks, orders=2).margin == 2.5


def test_the_same_answer_twice_is_a_tie_that_nobody_is_asked_about():
    found = outcome(shown(texts=("same", "same")), [], orders=2)
    assert (found.share, found.identical) == (0.5, True)


def test_a_judge_that_always_takes_the_first_has_a_bias_of_one_and_only_ties():
    looks = [look(FIRST), look(FIRST, "B", "A")]
    assert position_bias(looks) == 1.0
    assert position_bias([look(SECOND), look(SECOND, "B", "A")]) == -1.0
    assert position_bias([look(FIRST), look(SECOND, "B", "A"), look(TIE)]) == 0.0
    assert position_bias([look(TIE), look(None)]) is None


OUTCOMES = [
    Outcome("1", "A", "B", 1.0),
    Outcome("2", "A", "B", 0.5),
    Outcome("3", "A", "B", 0.0),
    Outcome("4", "A", "B", None),
    Outcome("5", "A", "B", 1.0),
]


def test_what_is_won_by_one_is_lost_by_the_other():
    assert counts(OUTCOMES, "A") == {"wins": 2, "losses": 1, "ties": 1, "unjudged": 1}
    assert counts(OUTCOMES, "B") == {"wins": 1, "losses": 2, "ties": 1, "unjudged": 1}
    wins = wins_by_item(OUTCOMES, ["A", "B"])
    assert wins.sum(axis=0).tolist() == [[0, 2.5], [1.5, 0]]
    assert len(wins) == 4  # without the item that nobody judged


def test_lengths_are_told_of_winners_and_of_models():
    tokens = {"A": {str(n): 10 for n in range(6)}, "B": {str(n): 4 for n in range(6)}}
    assert winners_length(OUTCOMES, tokens) == {"winner_minus_loser": 2.0, "longer_wins": pytest.approx(2 / 3)}
    assert pair_document(OUTCOMES, "A", "B", tokens)["length_difference"] == 6.0


def test_p_is_that_of_the_sign_test():
    outcomes = [Outcome(str(n), "A", "B", 1.0) for n in range(9)] + [Outcome("l", "A", "B", 0.0)]
    found = pair_document(outcomes, "A", "B", {m: {one.item: 1 for one in outcomes} for m in "AB"})
    assert found["p"] == pytest.approx(2 * 11 / 2**10)  # 10 and 9 of 10, both tails
    assert found["low"] < found["share"] == 0.9 < found["high"]
    won = pair_document(outcomes[:9], "A", "B", {m: {one.item: 1 for one in outcomes} for m in "AB"})
    assert won["low"] == pytest.approx(0.025 ** (1 / 9))  # Clopper and Pearson's


def test_kappa_of_two_is_cohens():
    """Yes and yes 20 times, yes and no 5, no and yes 10, no and no 15: κ is 0.4."""
    ours = [1] * 25 + [0] * 25
    theirs = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen(ours, theirs) == pytest.approx(0.4)
    assert cohen([], []) is None
    assert cohen([1, 1], [1, 1]) is None


def test_kappa_of_several_is_fleiss():
    """Ten things, fourteen judges, five categories (Fleiss 1971's form): κ is 0.210."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss(table) == pytest.approx(0.210, abs=5e-4)
    with pytest.raises(ValueError, match="same number"):
        fleiss([[1, 1], [2, 1]])


def test_people_agree_on_models_whatever_order_they_saw():
    looks = [
        Look(str(n), *order, by, FIRST if order[0] == better else SECOND)
        for by, order in (("ann", ("A", "B")), ("bob", ("B", "A")))
        for n, better in enumerate("ABAB")
    ]
    found = agreement(looks)
    assert found is not None
    assert found["cohen"][0] == {"annotators": ["ann", "bob"], "pairs": 4, "agreed": 1.0, "kappa": 1.0}
    assert found["fleiss"] is None
    assert agreement(looks[:4]) is None
    third = [Look(str(n), "A", "B", "cem", FIRST) for n in range(4)]
    several = agreement(looks + third)
    assert several is not None
    assert several["fleiss"]["annotators"] == 3
    assert several["fleiss"]["kappa"] == pytest.approx(fleiss([[0, 0, 3], [2, 0, 1], [0, 0, 3], [2, 0, 1]]))


@given(st.integers(0, 1000), st.integers(1, 9))
def test_orders_are_drawn_and_two_people_see_opposite_ones(seed, items):
    pairs = [shown(item=str(n)) for n in range(items)]
    ann, bob = (shown_to(name, place, pairs, twice=False, seed=seed) for place, name in enumerate(("ann", "bob")))
    assert {one.key for one in ann} | {one.key for one in bob} == {
        key for one in pairs for key in (one.key, one.turned.key)
    }
    assert ann == shown_to("ann", 0, pairs, twice=False, seed=seed)


def test_one_person_sees_both_orders_the_second_behind_all_first_ones():
    pairs = [shown(item=str(n)) for n in range(20)]
    found = shown_to("ann", 0, pairs, twice=True)
    assert len({one.key for one in found}) == 40
    assert {one.item.id for one in found[:20]} == {one.item.id for one in pairs}
    assert 2 < sum(one.first == "A" for one in found[:20]) < 18


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ('{"better": "A"}', FIRST),
        ('Well. {"better": " b "} it is', SECOND),
        ('```json\n{"better": "tie"}\n```', TIE),
        ("A", FIRST),
        ("Answer B.", SECOND),
        ("tie", TIE),
        ("A good answer is the second", None),
        ('{"better": "C"}', None),
        ('{"better": 1}', None),
        ("", None),
        ("Both are fine", None),
    ],
)
def test_a_judges_words_are_read_or_are_no_verdict(text, winner):
    assert winner_in(text) is winner


@pytest.mark.parametrize("text", ["", "model:", "reward:", "nobody", "judge.py:", ":f", "judge.py:not a name"])
def test_a_judge_that_is_none_is_told_with_what_would_be_right(text):
    with pytest.raises(Exception, match=r"--judge: .* names no judge; give one of expected, reward:RUN"):
        judge_name(text)


def function(tmp_path: Path, body: str) -> str:
    file = tmp_path / "judge.py"
    file.write_text(body)
    return f"{file}:judge"


@pytest.mark.parametrize(
    ("returned", "winner", "margin"),
    [("'second'", SECOND, None), ("0", TIE, 0.0), ("-2.5", SECOND, 2.5), ("3", FIRST, 3.0), ("None", None, None)],
)
def test_a_function_may_say_a_word_or_a_number_or_nothing(tmp_path, returned, winner, margin):
    name = function(tmp_path, f"def judge(prompt, first, second):\n    return {returned}\n")
    assert takes_pairs(name)
    ((_, found, _),) = next(FunctionJudge(name).looks([shown()]))
    assert (found.winner, found.margin) == (winner, margin)


@pytest.mark.parametrize("returned", ["'better'", "True", "float('nan')", "[1]", "{}", "b'1'"])
def test_a_function_that_returns_something_else_is_told_its_contract(tmp_path, returned):
    name = function(tmp_path, f"def judge(prompt, first, second):\n    return {returned}\n")
    with pytest.raises(Exception, match=r"--judge: .*judge returned .* prompts.jsonl, line 1; it must return 'first'"):
        next(FunctionJudge(name).looks([shown()]))


def test_a_function_may_take_columns_and_must_take_what_there_is(tmp_path):
    name = function(tmp_path, "def judge(prompt, first, second, ward):\n    return 'first' if ward == 'heart' else 0\n")
    ((_, found, _),) = next(FunctionJudge(name).looks([shown()]))
    assert found.winner is FIRST
    lacking = function(tmp_path / "..", "def judge(prompt, first, second, doctor):\n    return 0\n")
    with pytest.raises(Exception, match="takes 'doctor', which is no column"):
        next(FunctionJudge(lacking).looks([shown()]))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def judge(first, second, prompt):\n    return 0\n", "must take .prompt, first, second. in this order"),
        ("def other():\n    pass\n", "has no function 'judge'"),
        ("1 / 0\n", "cannot be loaded: ZeroDivisionError"),
    ],
)
def test_a_function_that_cannot_be_asked_is_told_before_anything(tmp_path, body, said):
    with pytest.raises(Exception, match=f"--judge: .*{said}"):
        FunctionJudge(function(tmp_path, body))


def test_looks_are_there_again_and_a_line_that_was_cut_is_gone(tmp_path):
    one = shown()
    kept = KeptLooks(tmp_path)
    kept.add(one, look(FIRST, by="ann"), "people")
    kept.add(one, look(SECOND, by="bob"), "people")
    kept.add(one, look(TIE, by="ann"), "people")  # looked again
    file = tmp_path / "verdicts.jsonl"
    file.write_text(file.read_text() + '{"of": "cut o')
    found = KeptLooks(tmp_path).of(one, "people")
    assert {name: own.winner for name, own in found.items()} == {"ann": TIE, "bob": SECOND}
    assert len(file.read_text().splitlines()) == 3
    assert KeptLooks(tmp_path).of(one, "another judge") == {}
    assert KeptLooks(tmp_path).of(shown(texts=("yes", "changed")), "people") == {}
    assert KeptLooks(tmp_path).of(one.turned, "people") == {}


def test_turns_and_tools_of_a_prompt_come_into_its_preference():
    record = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}],
        "tools": [{"type": "function", "function": {"name": "ward", "parameters": {"type": "object"}}}],
        "chosen": "another",
        "rejected": "one",
    }
    (item,) = items_of([Record(record, Path("pairs.jsonl"), 1)], "pairs.jsonl", Reading()).items
    one = Shown(item, "A", "B", ("There.", "Nowhere."))
    (found,), unreadable = preferences([(one, Outcome(item.id, "A", "B", 1.0, 1.0))])
    assert found == {**record, "chosen": "There.", "rejected": "Nowhere.", "margin": 1.0}
    assert unreadable == 0


def test_preferences_are_the_pairs_with_a_winner_that_a_stage_can_read():
    won = (shown(), Outcome("1", "A", "B", 1.0, 0.5))
    lost = (shown(item="2"), Outcome("2", "A", "B", 0.0, 1.0))
    tie = (shown(item="3"), Outcome("3", "A", "B", 0.5))
    empty = (shown(item="4", texts=("", "no")), Outcome("4", "A", "B", 0.0, 1.0))
    records, unreadable = preferences([won, lost, tie, empty])
    assert records == [
        {"prompt": "Question 1?", "chosen": "yes", "rejected": "no", "margin": 0.5},
        {"prompt": "Question 2?", "chosen": "no", "rejected": "yes", "margin": 1.0},
    ]
    assert unreadable == 1
    assert json.loads(json.dumps(records)) == records
